"""Reconstruction losses: the target's output against its outputs under masks."""

from collections.abc import Iterable, Iterator
from typing import Literal

import torch

from spd_core.component_model import Cache, ComponentModel, MaskInfo
from spd_core.config.losses import Routing
from spd_core.data.batches import Batch
from spd_core.losses.distance import LossParts, distance
from spd_core.masks import draw_routes, stochastic_masks
from spd_core.rows import at_rows

Source = Literal["unmasked", "ci_masked", "stochastic"]


def recon(model: ComponentModel, batch: Batch, passes: Iterable[dict[str, MaskInfo]]) -> LossParts:
    """Distance between the target's output and the masked one, over passes under these masks."""
    parts = []
    for masks in passes:
        pred = model.run_masked(batch.examples, masks, own_acts=batch.own_acts)
        parts.append(distance(model.config.distance, pred, batch.target_out))
    return _total(parts)


def masks_of_passes(
    model: ComponentModel, batch: Batch, source: Source, routing: Routing, purpose: str
) -> Iterator[dict[str, MaskInfo]]:
    """The masks of every pass, drawn as its turn comes.

    `stochastic` takes `n_mask_samples` draws; `layerwise` a pass for every module. `purpose` names
    the random streams, so that no two losses share numbers.
    """
    n_samples = model.config.n_mask_samples if source == "stochastic" else 1
    for sample in range(n_samples):
        for routes in draw_routes(batch, routing, f"{purpose}:route:{sample}"):
            match source:
                case "unmasked":
                    yield {n: MaskInfo(None, None, rows) for n, rows in routes.items()}
                case "ci_masked":
                    lower = {n: batch.ci[n].lower for n in routes}
                    at = {n: at_rows(x, routes[n], x.dim() - 1) for n, x in lower.items()}
                    yield {n: MaskInfo(at[n], None, rows) for n, rows in routes.items()}
                case "stochastic":
                    part = f"{purpose}:{sample}:{next(iter(routes))}"
                    yield stochastic_masks(model, batch, routes, part)


def hidden_acts_recon(model: ComponentModel, batch: Batch, purpose: str) -> LossParts:
    """Squared error between the inputs of the decomposed modules, with and without masks.

    Per input element, over all modules but embeddings, whose inputs are tokens.
    """
    compared = [n for n, x in batch.inputs.items() if x.is_floating_point()]
    if not compared:
        raise ValueError("stochastic_hidden_acts_recon: only embeddings are decomposed")
    parts, everywhere = [], dict.fromkeys(batch.ci)
    for sample in range(model.config.n_mask_samples):
        cache = Cache()
        masks = stochastic_masks(model, batch, everywhere, f"{purpose}:{sample}")
        model.run_masked(batch.examples, masks, cache, batch.own_acts)
        parts += [distance("mse", cache.inputs[n], batch.inputs[n]) for n in compared]
    return _total(parts)


def _total(parts: list[LossParts]) -> LossParts:
    return torch.stack([sum_ for sum_, _ in parts]).sum(), sum(count for _, count in parts)
