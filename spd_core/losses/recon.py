"""Reconstruction losses: a mask source (unmasked, ci, stochastic) times a routing."""

from typing import Literal

import torch

from spd_core.component_model import Cache, ComponentModel, MaskInfo
from spd_core.config.losses import StaticProbabilityConfig, UniformKSubsetConfig
from spd_core.data.batches import Batch
from spd_core.losses.distance import LossParts, distance
from spd_core.masks import stochastic_masks
from spd_core.routing import Route, route_all, route_static_probability, route_uniform_k_subset

Routing = Literal["all", "layerwise"] | UniformKSubsetConfig | StaticProbabilityConfig
Routes = dict[str, Route]
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
                    masks = draw_masks(model, batch, routes, part)
            passes.append(masked_distance(model, batch, masks))
    return total(passes)


def hidden_acts_recon(model: ComponentModel, batch: Batch, purpose: str) -> LossParts:
    """Squared error between the inputs of the decomposed modules, with and without masks.

    Per input element, over all modules but embeddings, whose inputs are tokens.
    """
    compared = [n for n, x in batch.inputs.items() if x.is_floating_point()]
    if not compared:
        raise ValueError("stochastic_hidden_acts_recon: only embeddings are decomposed")
    passes = []
    for sample in range(model.config.n_mask_samples):
        cache = Cache()
        masks = draw_masks(model, batch, route_all(list(batch.ci)), f"{purpose}:{sample}")
        model.run_masked(batch.examples, masks, cache, batch.own_acts)
        passes += [distance("mse", cache.inputs[n], batch.inputs[n]) for n in compared]
    return total(passes)


def draw_masks(
    model: ComponentModel, batch: Batch, routes: Routes, purpose: str
) -> dict[str, MaskInfo]:
    """Stochastic masks of the routed modules, with a delta mask where the config has one."""
    config, stream = model.config, batch.randomness.batch_stream(purpose)
    return stochastic_masks(batch.ci, config.sampling, config.delta_component, routes, stream)


def draw_routes(batch: Batch, routing: Routing, purpose: str) -> list[Routes]:
    """The forward passes of one sample: which modules are masked, and at which positions."""
    names = list(batch.ci)
    match routing:
        case "all":
            return [route_all(names)]
        case "layerwise":
            return [route_all([name]) for name in names]
        case UniformKSubsetConfig():
            stream = batch.randomness.batch_stream(purpose)
            return [route_uniform_k_subset(names, batch.positions, stream)]
        case StaticProbabilityConfig(p=p):
            stream = batch.randomness.batch_stream(purpose)
            return [route_static_probability(names, p, batch.positions, stream)]


def masked_distance(model: ComponentModel, batch: Batch, masks: dict[str, MaskInfo]) -> LossParts:
    pred = model.run_masked(batch.examples, masks, own_acts=batch.own_acts)
    return distance(model.config.distance, pred, batch.target_out)


def total(parts: list[LossParts]) -> LossParts:
    return torch.stack([sum_ for sum_, _ in parts]).sum(), sum(count for _, count in parts)
