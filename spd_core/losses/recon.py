"""Reconstruction losses: a mask source (unmasked, ci, stochastic) times a routing."""

from typing import Literal

import torch

from spd_core.component_model import Cache, ComponentModel, MaskInfo
from spd_core.data.batches import Batch
from spd_core.losses.distance import LossParts, distance
from spd_core.masks import Routing, draw_routes, stochastic_masks

Source = Literal["unmasked", "ci_masked", "stochastic"]


def recon(
    model: ComponentModel, batch: Batch, source: Source, routing: Routing, purpose: str
) -> LossParts:
    """Distance between the target's output and the masked one.

    `stochastic` averages over `n_mask_samples` draws; `layerwise` over the modules, masking one at
    a time. `purpose` names the random streams, so that no two losses share numbers.
    """
    n_samples = model.config.n_mask_samples if source == "stochastic" else 1
    passes = []
    for sample in range(n_samples):
        for routes in draw_routes(batch, routing, f"{purpose}:route:{sample}"):
            match source:
                case "unmasked":
                    masks = {n: MaskInfo(None, None, route) for n, route in routes.items()}
                case "ci_masked":
                    masks = {n: MaskInfo(batch.ci[n].lower, None, r) for n, r in routes.items()}
                case "stochastic":
                    part = f"{purpose}:{sample}:{next(iter(routes))}"
                    masks = stochastic_masks(model, batch, routes, part)
            passes.append(masked_distance(model, batch, masks))
    return total(passes)


def hidden_acts_recon(model: ComponentModel, batch: Batch, purpose: str) -> LossParts:
    """Squared error between the inputs of the decomposed modules, with and without masks.

    Per input element, over all modules but embeddings, whose inputs are tokens.
    """
    compared = [n for n, x in batch.inputs.items() if x.is_floating_point()]
    if not compared:
        raise ValueError("stochastic_hidden_acts_recon: only embeddings are decomposed")
    passes, everywhere = [], dict.fromkeys(batch.ci)
    for sample in range(model.config.n_mask_samples):
        cache = Cache()
        masks = stochastic_masks(model, batch, everywhere, f"{purpose}:{sample}")
        model.run_masked(batch.examples, masks, cache, batch.own_acts)
        passes += [distance("mse", cache.inputs[n], batch.inputs[n]) for n in compared]
    return total(passes)


def masked_distance(model: ComponentModel, batch: Batch, masks: dict[str, MaskInfo]) -> LossParts:
    pred = model.run_masked(batch.examples, masks, own_acts=batch.own_acts)
    return distance(model.config.distance, pred, batch.target_out)


def total(parts: list[LossParts]) -> LossParts:
    return torch.stack([sum_ for sum_, _ in parts]).sum(), sum(count for _, count in parts)
