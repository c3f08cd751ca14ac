"""Masks from causal importances: m = ci + (1 - ci) * r."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from spd_core.ci_fns import CausalImportance
from spd_core.component_model import MaskInfo
from spd_core.randomness import BatchStream
from spd_core.routing import Route


def stochastic_masks(
    ci: dict[str, CausalImportance],
    sampling: Literal["continuous", "binomial"],
    delta_component: bool,
    routes: dict[str, Route],
    stream: BatchStream,
) -> dict[str, MaskInfo]:
    """Masks with random sources for the routed modules; the delta's source is always U(0, 1)."""
    masks = {}
    for name, route in routes.items():
        lower = ci[name].lower
        shape = lower.shape[1:]
        # One draw for the subcomponents and the delta: fewer passes over the generators.
        n_sources = shape[-1] + (1 if delta_component else 0)
        r = stream.uniform(*shape[:-1], n_sources)
        source = r[..., : shape[-1]]
        if sampling == "binomial":
            source = (source < 0.5).to(lower.dtype)
        masks[name] = MaskInfo(
            mask=interpolate(lower, source),
            delta_mask=r[..., -1] if delta_component else None,
            route=route,
        )
    return masks


def interpolate(
    ci: Float[Tensor, "... C"], source: Float[Tensor, "... C"]
) -> Float[Tensor, "... C"]:
    """m = ci + (1 - ci) r, written as r + ci (1 - r)."""
    return source + ci * (1 - source)
