"""The registry of losses: each is one function to (sum, count), for training and evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spd_core.base_config import CustomConfig
from spd_core.component_model import ComponentModel
from spd_core.config.losses import (
    AnyLossConfig,
    FaithfulnessConfig,
    ImportanceMinimalityConfig,
    PGDReconConfig,
    PGDSubsetReconConfig,
    ReconConfig,
    SubsetReconConfig,
)
from spd_core.data.batches import Batch, Batches
from spd_core.distributed import Dist
from spd_core.losses.distance import LossParts
from spd_core.losses.faithfulness import faithfulness
from spd_core.losses.minimality import (
    importance_minimality,
    power_sums,
    total_power_sums,
    with_gradient_of_part,
)
from spd_core.losses.pgd import own_sources, pgd_recon, shared_sources
from spd_core.losses.recon import Routing, hidden_acts_recon, recon
from spd_core.masks import Sources
from spd_core.parts import load_part
from spd_core.schedule import annealed_p


@dataclass(frozen=True)
class Step:
    """What all microbatches of a step have in common; the dicts are by name of the loss."""

    p: dict[str, float]
    power_sums: dict[str, Float[Tensor, "C_total_and_n"]]
    sources: dict[str, Sources]
    n_microbatches: int
    dist: Dist


@torch.no_grad()
def prepare_step(
    losses: Mapping[str, AnyLossConfig],
    model: ComponentModel,
    batches: Batches,
    n_microbatches: int,
    position: float,
    dist: Dist,
) -> Step:
    """Gather what a loss must know of the whole batch before its first part.

    `position` in training, from 0 to 1, sets the annealed p of importance minimality.
    """
    p, sums, sources = {}, {}, {}
    for name, loss in losses.items():
        if isinstance(loss, ImportanceMinimalityConfig):
            p[name] = annealed_p(loss, position)
            if n_microbatches > 1:
                sums[name] = total_power_sums(batches, p[name])
        if isinstance(loss, PGDReconConfig) and loss.scope == "shared_across_batch":
            sources[name] = shared_sources(model, batches, loss, _routing(name, loss), name, dist)
    return Step(p, sums, sources, n_microbatches, dist)


def loss_parts(
    name: str, config: AnyLossConfig, model: ComponentModel, batch: Batch, step: Step
) -> LossParts:
    """One loss on this rank as (sum, count); see `distributed` for how ranks add up.

    Of microbatches, the losses are averaged: all have the same number of examples.
    """
    match config:
        case FaithfulnessConfig():
            return faithfulness(model.components)
        case ImportanceMinimalityConfig():
            sums = power_sums(batch.ci, step.p[name])
            if step.n_microbatches > 1:
                total = step.power_sums[name]
                sums = with_gradient_of_part(total, sums, step.n_microbatches)
            return importance_minimality(sums, config.beta, step.dist)
        case PGDReconConfig():
            routing = _routing(name, config)
            if name in step.sources:
                sources = step.sources[name]
            else:
                sources = own_sources(model, batch, config, routing, name)
            return pgd_recon(model, batch, sources, routing, name)
        case CustomConfig():
            return load_part(f"losses.{name}", config, "loss")(model, batch)
        case ReconConfig() if name == "stochastic_hidden_acts_recon":
            return hidden_acts_recon(model, batch, name)
        case ReconConfig() | SubsetReconConfig():
            routing = _routing(name, config)
    match name.split("_recon")[0]:
        case "unmasked":
            return recon(model, batch, "unmasked", routing, name)
        case "ci_masked":
            return recon(model, batch, "ci", routing, name)
        case "stochastic":
            return recon(model, batch, "stochastic", routing, name)
        case _:
            raise AssertionError(name)


def _routing(name: str, config: ReconConfig | SubsetReconConfig | PGDReconConfig) -> Routing:
    if isinstance(config, SubsetReconConfig | PGDSubsetReconConfig):
        return config.routing
    return "layerwise" if name.endswith("_layerwise") else "all"
