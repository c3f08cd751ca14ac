"""Which modules run on their components, at which positions, under which masks."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_core.ci_fns import CausalImportance
from spd_core.component_model import ComponentModel, MaskInfo
from spd_core.config.losses import Routing, StaticProbabilityConfig, UniformKSubsetConfig
from spd_core.data.batches import Batch
from spd_core.fast import native
from spd_core.fast.masked import LazyMask
from spd_core.rows import Rows, at_rows

Routes = dict[str, Rows | Bool[Tensor, "..."] | None]
"""Where a module runs on its components; None = everywhere. Modules left out never do."""

Sources = dict[str, Float[Tensor, "... C_or_C_plus_1"]]
"""The source r of each module; with a delta component, the last entry is the delta's mask."""


def draw_routes(batch: Batch, routing: Routing, purpose: str) -> list[Routes]:
    """The forward passes of one sample: one, or for `layerwise` one for every module.

    uniform_k_subset: k ~ Uniform{1..n_modules}, then a uniformly random k-subset;
    static_probability: each module with probability p. Both independently per position.

    Raises:
        ValueError: modules that run at unlike positions are to be routed.
    """
    names, shape, randomness = list(batch.ci), batch.positions, batch.randomness
    match routing:
        case "all":
            return [dict.fromkeys(names)]
        case "layerwise":
            return [{name: None} for name in names]
        case UniformKSubsetConfig():
            stream = randomness.batch_stream(purpose)
            k = stream.integers(1, len(names) + 1, *shape)
            first = torch.arange(len(names), device=k.device) < k.unsqueeze(-1)
            chosen = first.scatter(-1, stream.uniform(*shape, len(names)).argsort(-1), first)
        case StaticProbabilityConfig(p=p):
            chosen = randomness.batch_stream(purpose).uniform(*shape, len(names)) < p
    for name, ci in batch.ci.items():
        if (at := ci.lower.shape[:-1]) != chosen.shape[:-1]:
            raise ValueError(
                f"decompose.modules: {name!r} runs at positions {tuple(at)}, but routes are for "
                f"{tuple(chosen.shape[:-1])}; leave it out"
            )
    each = {name: chosen[..., i] for i, name in enumerate(names)}
    if randomness.has_fixed_shapes:
        return [dict(each)]
    return [{name: Rows.of(at) for name, at in each.items()}]


def stochastic_masks(
    model: ComponentModel, batch: Batch, routes: Routes, purpose: str
) -> dict[str, MaskInfo]:
    """Masks with random sources for the routed modules; the delta's source is always U(0, 1)."""
    stream, sources = batch.randomness.batch_stream(purpose), {}
    lower, with_delta = {n: batch.ci[n].lower for n in routes}, model.config.delta_component
    at_once = batch.randomness.has_fixed_shapes or all(map(native.is_native, lower.values()))
    if at_once and model.config.sampling == "continuous":
        lazy = {n: LazyMask(lower[n], stream.next(), with_delta, at) for n, at in routes.items()}
        return {n: MaskInfo(lazy[n], None, at) for n, at in routes.items()}
    for name in routes:
        *leading, C = lower[name].shape[1:]
        r = stream.uniform(*leading, C + with_delta)
        if model.config.sampling == "binomial":
            r = torch.cat([(r[..., :C] < 0.5).to(r.dtype), r[..., C:]], -1)
        sources[name] = r
    return masks_from_sources(batch.ci, sources, routes)


def masks_from_sources(
    ci: dict[str, CausalImportance], sources: Sources, routes: Routes
) -> dict[str, MaskInfo]:
    """m = ci + (1 - ci) r for the routed modules; a source one longer than C masks the delta."""
    masks = {}
    for name, rows in routes.items():
        lower, source = ci[name].lower, sources[name]
        n_dims, C, is_shared = lower.dim() - 1, lower.shape[-1], source.shape[:-1].numel() == 1
        if is_shared and (native.is_native(lower) or not isinstance(rows, Rows)):
            masks[name] = MaskInfo(LazyMask(lower, source, source.shape[-1] > C, rows), None, rows)
            continue
        one = is_shared and isinstance(rows, Rows)
        source = source.flatten(0, -2) if one else at_rows(source, rows, n_dims)
        lower = at_rows(lower, rows, n_dims)
        r, delta_mask = source[..., :C], source[..., C] if source.shape[-1] > C else None
        mask = torch.addcmul(r, lower, 1 - r)  # r + ci (1 - r)
        masks[name] = MaskInfo(mask, delta_mask, rows)
    return masks
