"""Reconstruction under adversarial sources, found by projected gradient ascent (PGD)."""

from dataclasses import replace

import torch

from spd_core.component_model import ComponentModel
from spd_core.config.losses import PGDConfig, Routing
from spd_core.data.batches import Batch, Batches
from spd_core.distributed import Dist, over_ranks
from spd_core.fast.frozen import frozen
from spd_core.losses.recon import recon
from spd_core.masks import Sources, draw_routes, masks_from_sources


def worst_sources(
    model: ComponentModel,
    batches: Batches,
    search: PGDConfig,
    routing: Routing,
    purpose: str,
    shared_by: Dist | None,
) -> Sources:
    """source += step_size * sign(gradient of the distance), kept in [0, 1], n_steps times.

    With `shared_by`, all positions of all batches and ranks share one source, (1, ..., 1, C + 1):
    ranks start from the same numbers and follow the same sum of gradients, taken in one collective
    per step, so that they hold identical sources throughout. With None every datapoint of the one
    batch has its own, (batch, ..., C + 1), and nothing leaves the rank.
    """
    sources = _start(model, next(iter(batches())), search, f"{purpose}:sources", shared_by)
    passes = [draw_routes(batch, routing, f"{purpose}:route") for batch in batches()]
    for _ in range(search.n_steps):
        leaves = {name: source.detach().requires_grad_() for name, source in sources.items()}
        for batch, routes_of_batch in zip(batches(), passes, strict=True):
            # Evaluation runs under no_grad, and here the importances are constants.
            with torch.enable_grad(), frozen(model.component_parameters()):
                fixed = {n: replace(ci, lower=ci.lower.detach()) for n, ci in batch.ci.items()}
                masks = [masks_from_sources(fixed, leaves, routes) for routes in routes_of_batch]
                sum_, _ = recon(model, batch, masks)
            if sum_.requires_grad:  # else it depends on no module at all
                sum_.backward(inputs=list(leaves.values()))
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        if unused := leaves.keys() - gradients:
            raise ValueError(
                f"the target's output does not depend on {', '.join(unused)}, so {purpose} has "
                "no worst mask; leave these modules out of decompose.modules"
            )
        if shared_by is not None:
            gradients = over_ranks("sum", gradients, shared_by)
        for name, gradient in gradients.items():
            sources[name] = (sources[name] + search.step_size * gradient.sign()).clamp_(0, 1)
    return sources


def _start(
    model: ComponentModel, batch: Batch, search: PGDConfig, purpose: str, shared_by: Dist | None
) -> Sources:
    stream = batch.randomness.batch_stream(purpose)
    positions = {n: ci.lower.shape[1:-1] for n, ci in batch.distinct_ci.items()}
    if shared_by is not None:
        stream = batch.randomness.shared_stream(purpose)
        positions = {n: (1,) * len(at) for n, at in positions.items()}
    widths = {n: c.C + model.config.delta_component for n, c in model.components.items()}
    random = {name: stream.uniform(*positions[name], width) for name, width in widths.items()}
    if search.init == "random":
        return random
    return {n: torch.full_like(r, float(search.init == "ones")) for n, r in random.items()}
