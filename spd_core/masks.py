"""Masks from causal importances: m = ci + (1 - ci) * r."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spd_core.ci_fns import CausalImportance
from spd_core.component_model import MaskInfo
from spd_core.randomness import BatchStream
from spd_core.routing import Route

Sources = dict[str, Float[Tensor, "... C_or_C_plus_1"]]
"""The source r of each module; with a delta component, the last entry is the delta's mask."""


def stochastic_masks(
    ci: dict[str, CausalImportance],
    sampling: Literal["continuous", "binomial"],
    delta_component: bool,
    routes: dict[str, Route],
    stream: BatchStream,
) -> dict[str, MaskInfo]:
    """Masks with random sources for the routed modules; the delta's source is always U(0, 1)."""
    sources = {}
    for name in routes:
        *leading, C = ci[name].lower.shape[1:]
        # One draw for the subcomponents and the delta: fewer passes over the generators.
        r = stream.uniform(*leading, C + delta_component)
        if sampling == "binomial":
            r = torch.cat([(r[..., :C] < 0.5).to(r.dtype), r[..., C:]], -1)
        sources[name] = r
    return masks_from_sources(ci, sources, routes)


def masks_from_sources(
    ci: dict[str, CausalImportance], sources: Sources, routes: dict[str, Route]
) -> dict[str, MaskInfo]:
    """Masks of the routed modules; a source one longer than C masks the delta as well."""
    masks = {}
    for name, route in routes.items():
        lower, source = ci[name].lower, sources[name]
        C = lower.shape[-1]
        delta_mask = source[..., C] if source.shape[-1] > C else None
        masks[name] = MaskInfo(interpolate(lower, source[..., :C]), delta_mask, route)
    return masks


def interpolate(
    ci: Float[Tensor, "... C"], source: Float[Tensor, "... C"]
) -> Float[Tensor, "... C"]:
    """m = ci + (1 - ci) r, written as r + ci (1 - r)."""
    return torch.addcmul(source, ci, 1 - source)
