"""One optimisation step: batches to losses, losses to gradients, gradients to new weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from spd_core import distributed
from spd_core.config import RunConfig
from spd_core.config.losses import ImportanceMinimalityConfig
from spd_core.data.batches import Batch, Batches, Decomposition, training_batches
from spd_core.losses import loss_parts, prepare_step
from spd_core.schedule import annealed_p, schedule_value

Observe = Callable[[Batch], None]


@dataclass(frozen=True)
class StepResult:
    """What one step reports; it stays on the device, so that a GPU is never waited for."""

    losses: dict[str, Float[Tensor, ""]]
    total: Float[Tensor, ""]
    grad_norms: dict[str, Float[Tensor, ""]]
    n_positions: int

    def values(self) -> dict[str, float]:
        """Everything by its name in metrics.jsonl; reads from the device."""
        values = {f"loss/{name}": loss for name, loss in self.losses.items()}
        values["loss/total"] = self.total
        values |= {f"grad_norm_before_clip/{name}": norm for name, norm in self.grad_norms.items()}
        return {name: value.item() for name, value in values.items()}


def optimisation_step(
    d: Decomposition, optimizer: torch.optim.AdamW, step: int, draw: int, observe: Observe
) -> StepResult:
    """Step number `step` (0-based); `observe` sees every microbatch.

    `draw` is the number that its batch and masks are drawn by: `step`, unless others are wanted.
    Losses are over all ranks and microbatches, norms over the whole gradient before clipping.
    """
    optimizer.zero_grad(set_to_none=True)
    with d.autocast():
        batches, n_micro = training_batches(d, draw)
    losses, n_positions = accumulate_gradients(d, batches, n_micro, step, observe)
    distributed.sum_gradients(d.model.trained_parameters().values(), d.dist)
    train, clip, inf = d.config.train, d.config.train.grad_clip, float("inf")
    norms = {  # before clipping, which is in place
        "components": clip_grad_norm_(d.model.component_parameters(), clip.components or inf),
        "ci_fns": clip_grad_norm_(d.model.ci_fn_parameters(), clip.ci_fns or inf),
    }
    for group in optimizer.param_groups:
        group["lr"] = schedule_value(train.lr, step, train.steps)
    optimizer.step()
    coeffs = coefficients(d.config, step)
    total = torch.stack([coeffs[name] * loss for name, loss in losses.items()]).sum()
    return StepResult(losses, total, norms, n_positions * d.dist.world_size)


def accumulate_gradients(
    d: Decomposition, batches: Batches, n_micro: int, step: int, observe: Observe
) -> tuple[dict[str, Float[Tensor, ""]], int]:
    """Add this rank's gradient of the weighted losses to `.grad`.

    Returns the losses over all ranks (detached), and this rank's number of positions.
    """
    losses, coeffs = d.config.losses.configured(), coefficients(d.config, step)
    with d.autocast():
        whole = prepare_step(d, losses, batches, n_micro, step / d.config.train.steps)
    totals, n_positions, counts = [], 0, dict[str, int]()
    # Nothing of a microbatch but its gradient outlives its turn.
    parts_of_batch = iter(batches())
    for _ in range(n_micro):
        with d.autocast():
            batch = next(parts_of_batch)
            observe(batch)
            parts = {n: loss_parts(n, loss, batch, whole) for n, loss in losses.items()}
        for name, (_, count) in parts.items():
            if counts.setdefault(name, count) != count:
                raise ValueError(
                    f"losses.{name} has count {count} in one microbatch and {counts[name]} in "
                    "another; such a loss needs train.microbatch_size=null"
                )
        sums = torch.stack([sum_ for sum_, _ in parts.values()])
        both = torch.stack([sums.detach(), sums.new_tensor([float(n) for n in counts.values()])])
        both = distributed.all_reduce("sum", both, d.dist)
        weights = sums.new_tensor([coeffs[name] / n_micro for name in losses])
        (sums * weights / both[1]).sum().backward()
        totals.append(both)
        n_positions += batch.n_positions
        del batch, parts, sums  # before the next one is made
    all_sums, all_counts = torch.stack(totals).sum(0)
    return dict(zip(losses, all_sums / all_counts, strict=True)), n_positions


def coefficients(config: RunConfig, step: int) -> dict[str, float]:
    """The weight of every loss at a step (0-based)."""
    losses, steps = config.losses.configured(), config.train.steps
    return {name: schedule_value(loss.coeff, step, steps) for name, loss in losses.items()}


def schedules(config: RunConfig, step: int) -> dict[str, float]:
    """Everything that changes over training by plan, by its name in metrics.jsonl."""
    values = {"schedule/lr": schedule_value(config.train.lr, step, config.train.steps)}
    for name, loss in config.losses.configured().items():
        if not isinstance(loss.coeff, float):
            values[f"schedule/coeff/{name}"] = schedule_value(loss.coeff, step, config.train.steps)
        if isinstance(loss, ImportanceMinimalityConfig):
            values[f"schedule/p/{name}"] = annealed_p(loss, step / config.train.steps)
    return values
