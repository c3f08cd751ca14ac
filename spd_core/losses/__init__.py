"""The registry of losses: each is one function to (sum, count), for training and evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from spd_core.base_config import CustomConfig
from spd_core.config import losses as options
from spd_core.config.losses import PGDMultibatchConfig, PGDReconConfig
from spd_core.data.batches import Batch, Batches, Decomposition
from spd_core.distributed import all_reduce
from spd_core.losses import minimality, pgd
from spd_core.losses.distance import LossParts, faithfulness
from spd_core.losses.recon import Source, hidden_acts_recon, masks_of_passes, recon
from spd_core.masks import Sources, draw_routes, masks_from_sources
from spd_core.parts import load_part


@dataclass(frozen=True)
class Step:
    """What all microbatches of a step have in common; the dicts are by name of the loss."""

    d: Decomposition
    n_microbatches: int
    p: Mapping[str, float | Tensor]  # of importance minimality
    power_sums: dict[str, Float[Tensor, "C_total_and_n"]]
    sources: dict[str, Sources]


@torch.no_grad()
def prepare_step(
    d: Decomposition,
    losses: Mapping[str, options.LossConfig],
    batches: Batches,
    n_microbatches: int,
    p: Mapping[str, float | Tensor],
) -> Step:
    """Gather what a loss must know of the whole batch before its first part."""
    step = Step(d, n_microbatches, p, {}, {})
    for name, loss in losses.items():
        match loss:
            case options.ImportanceMinimalityConfig() if n_microbatches > 1:
                parts = [minimality.power_sums(batch, p[name]) for batch in batches()]
                step.power_sums[name] = torch.stack(parts).sum(0)
            case PGDMultibatchConfig() | PGDReconConfig(scope="shared_across_batch"):
                routing, active = _routing(name, loss), lambda: (b.active or b for b in batches())
                found = pgd.worst_sources(d.model, active, loss, routing, name, d.dist)
                step.sources[name] = found
    return step


def loss_parts(name: str, config: options.LossConfig, batch: Batch, step: Step) -> LossParts:
    """One loss on this rank as (sum, count); see `distributed` for how ranks add up.

    Of microbatches, the losses are averaged: all have the same number of examples.
    """
    model, active, routing = step.d.model, batch.active or batch, _routing(name, config)
    match config:
        case options.ImportanceMinimalityConfig():
            own = minimality.power_sums(batch, step.p[name])
            of_rank = step.power_sums[name] if step.n_microbatches > 1 else own
            whole = all_reduce("sum", of_rank, step.d.dist)
            # The whole batch's value with this part's gradient, scaled because the loss, whole in
            # every microbatch of every rank, is averaged over them.
            n_parts = step.n_microbatches * step.d.dist.world_size
            sums = whole + n_parts * (own - own.detach())
            return minimality.importance_minimality(sums, config.beta)
        case CustomConfig():
            return load_part(f"losses.{name}", config, "loss")(model, batch)
        case options.PGDConfig():
            sources = step.sources.get(name) or pgd.worst_sources(
                model, lambda: [active], config, routing, name, shared_by=None
            )
            routes = draw_routes(active, routing, f"{name}:route")  # those that the search saw
            masks = [masks_from_sources(active.ci, sources, one_pass) for one_pass in routes]
            parts = recon(model, active, masks)
        case _ if name == "faithfulness":
            return faithfulness(model.components)
        case _ if name == "stochastic_hidden_acts_recon":
            parts = hidden_acts_recon(model, active, name)
        case _:
            source = cast(Source, name.split("_recon")[0])
            parts = recon(model, active, masks_of_passes(model, active, source, routing, name))
    # Every example counts, also those that add nothing to the sum.
    return parts[0], parts[1] * len(batch.examples) // len(active.examples)


def _routing(name: str, config: options.LossConfig) -> options.Routing:
    if isinstance(config, options.SubsetReconConfig | PGDMultibatchConfig):
        return config.routing
    return "layerwise" if name.endswith("_layerwise") else "all"
