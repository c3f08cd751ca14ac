"""Reconstruction under adversarial sources, found by projected gradient ascent (PGD)."""

from dataclasses import replace

import torch
from torch import Tensor

from spd_core.component_model import ComponentModel
from spd_core.config.losses import PGDConfig
from spd_core.data.batches import Batch, Batches
from spd_core.distributed import Dist, all_sum
from spd_core.losses.distance import LossParts
from spd_core.losses.recon import Routes, Routing, draw_routes, masked_distance, total
from spd_core.masks import Sources, masks_from_sources


def pgd_recon(
    model: ComponentModel, batch: Batch, sources: Sources, routing: Routing, purpose: str
) -> LossParts:
    """Distance between the target's output and the one masked by the given sources.

    `purpose` is that of the search, so that the loss sees the routes that the search saw.
    """
    return _distance(model, batch, sources, draw_routes(batch, routing, f"{purpose}:route"))


def own_sources(
    model: ComponentModel, batch: Batch, config: PGDConfig, routing: Routing, purpose: str
) -> Sources:
    """The worst sources of every datapoint, (batch, ..., C + 1); local to a rank."""
    stream = batch.randomness.batch_stream(f"{purpose}:sources")
    sources = {
        name: _start(config, stream.uniform(*batch.positions, width))
        for name, width in _widths(model).items()
    }
    return _ascend(sources, lambda: [batch], model, config, routing, purpose, dist=None)


def shared_sources(
    model: ComponentModel,
    batches: Batches,
    config: PGDConfig,
    routing: Routing,
    purpose: str,
    dist: Dist,
) -> Sources:
    """The worst sources that all positions of all batches and ranks share, (1, ..., 1, C + 1).

    Ranks start from the same numbers and follow the sign of the same gradient, so that they hold
    identical sources throughout.
    """
    first = next(iter(batches()))
    stream = first.randomness.shared_stream(f"{purpose}:sources")
    ones = (1,) * (1 + len(first.positions))
    sources = {
        name: _start(config, torch.rand(*ones, width, generator=stream, device=stream.device))
        for name, width in _widths(model).items()
    }
    return _ascend(sources, batches, model, config, routing, purpose, dist)


def _widths(model: ComponentModel) -> dict[str, int]:
    return {n: c.C + model.config.delta_component for n, c in model.components.items()}


def _start(config: PGDConfig, random: Tensor) -> Tensor:
    match config.init:
        case "random":
            return random
        case "ones":
            return torch.ones_like(random)
        case "zeroes":
            return torch.zeros_like(random)


def _ascend(
    sources: Sources,
    batches: Batches,
    model: ComponentModel,
    config: PGDConfig,
    routing: Routing,
    purpose: str,
    dist: Dist | None,
) -> Sources:
    """source += step_size * sign(gradient of the distance), kept in [0, 1], n_steps times.

    The gradient is summed over batches and, with `dist`, over ranks in one collective per step.

    Raises:
        ValueError: the output does not depend on some module's masks.
    """
    names = list(sources)
    routes = [draw_routes(batch, routing, f"{purpose}:route") for batch in batches()]
    for _ in range(config.n_steps):
        gradients = [torch.zeros_like(source) for source in sources.values()]
        for batch, batch_routes in zip(batches(), routes, strict=True):
            # Evaluation runs under no_grad, and here the importances are constants.
            with torch.enable_grad():
                tracked = {n: source.detach().requires_grad_() for n, source in sources.items()}
                fixed = {n: replace(ci, lower=ci.lower.detach()) for n, ci in batch.ci.items()}
                sum_, _ = _distance(model, replace(batch, ci=fixed), tracked, batch_routes)
            leaves, parts = list(tracked.values()), ()
            if sum_.requires_grad:  # else it depends on no module at all
                parts = torch.autograd.grad(sum_, leaves, allow_unused=True)
            unused = [n for i, n in enumerate(names) if not parts or parts[i] is None]
            if unused:
                raise ValueError(
                    f"the target's output does not depend on {', '.join(unused)}, so {purpose} has "
                    "no worst mask; leave these modules out of decompose.modules"
                )
            gradients = [g + part for g, part in zip(gradients, parts, strict=True)]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        if dist is not None:
            flat = all_sum(flat, dist)
        steps = flat.sign().mul_(config.step_size).split([s.numel() for s in sources.values()])
        sources = {
            name: (source + step.view_as(source)).clamp_(0, 1)
            for (name, source), step in zip(sources.items(), steps, strict=True)
        }
    return sources


def _distance(
    model: ComponentModel, batch: Batch, sources: Sources, routes: list[Routes]
) -> LossParts:
    return total(
        [
            masked_distance(model, batch, masks_from_sources(batch.ci, sources, one_pass))
            for one_pass in routes
        ]
    )
