"""One optimisation step: batches to losses, losses to gradients, gradients to new weights."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from spd_core import distributed
from spd_core.config import RunConfig
from spd_core.data.batches import Batch, Batches, Decomposition, training_batches
from spd_core.fast.overlap import summed_gradients
from spd_core.losses import loss_parts, prepare_step
from spd_core.metrics import Sums, add
from spd_core.schedule import annealed_ps, schedule_value

Observe = Callable[[Batch], Sums]
Given = tuple[Int[Tensor, ""] | None, Float[Tensor, "batch ..."] | None]
"""Where a recorded step finds its number, and examples that are not drawn on the device."""


@dataclass(frozen=True)
class Scheduled:
    """What changes from step to step by plan, by loss: floats, or a recorded step's tensors."""

    coeffs: dict[str, Any]
    p: dict[str, Any]


@dataclass(frozen=True)
class StepResult:
    """What one step reports; it stays on the device, so that a GPU is never waited for."""

    losses: dict[str, Float[Tensor, ""]]
    total: Float[Tensor, ""]
    grad_norms: dict[str, Float[Tensor, ""]]
    n_positions: int
    observed: Sums

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
    """
    set_lr(d.config, optimizer, step)
    return descend(d, optimizer, draw, scheduled(d.config, step), observe, given=(None, None))


def set_lr(config: RunConfig, optimizer: torch.optim.AdamW, step: int) -> None:
    lr = schedule_value(config.train.lr, step, config.train.steps)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr


def descend(
    d: Decomposition,
    optimizer: torch.optim.AdamW,
    draw: int,
    now: Scheduled,
    observe: Observe,
    given: Given,
) -> StepResult:
    """A step at the optimiser's own rate, without a wait for the device.

    Losses are over all ranks and microbatches, norms over the whole gradient before clipping.
    """
    optimizer.zero_grad(set_to_none=True)
    with d.autocast():
        batches, n_micro = training_batches(d, draw, *given)
    losses, observed, n_positions = accumulate_gradients(d, batches, n_micro, now, observe)
    clip, inf = d.config.train.grad_clip, float("inf")
    norms = {  # before clipping, which is in place
        "components": clip_grad_norm_(d.model.component_parameters(), clip.components or inf),
        "ci_fns": clip_grad_norm_(d.model.ci_fn_parameters(), clip.ci_fns or inf),
    }
    optimizer.step()
    total = torch.stack([now.coeffs[name] * loss for name, loss in losses.items()]).sum()
    return StepResult(losses, total, norms, n_positions * d.dist.world_size, observed)


def accumulate_gradients(
    d: Decomposition, batches: Batches, n_micro: int, now: Scheduled, observe: Observe
) -> tuple[dict[str, Float[Tensor, ""]], Sums, int]:
    """Add the gradient of the weighted losses to `.grad`, and sum that over ranks.

    Returns the losses over all ranks (detached), what this rank observed, and its n of positions.
    """
    losses, observed = d.config.losses.configured(), Sums()
    with d.autocast():
        held = list(batches()) if n_micro == 1 else []  # its importances are computed once
        whole = prepare_step(d, losses, batches, n_micro, now.p)
    totals, n_positions, counts = [], 0, dict[str, int]()
    parts_of_batch, trained = iter(batches()), list(d.model.trained_parameters().values())
    for micro in range(n_micro):
        with d.autocast():
            batch = next(parts_of_batch)
            add(observed, observe(batch))
            parts = {n: loss_parts(n, loss, batch, whole) for n, loss in losses.items()}
        for name, (_, count) in parts.items():
            if counts.setdefault(name, count) != count:
                raise ValueError(
                    f"losses.{name} has count {count} in one microbatch and {counts[name]} in "
                    "another; such a loss needs train.microbatch_size=null"
                )
        sums = torch.stack([sum_ for sum_, _ in parts.values()])
        both = torch.stack([sums.detach(), _stack(map(float, counts.values()), sums)])
        both = distributed.all_reduce("sum", both, d.dist)
        weights = _stack((now.coeffs[name] / n_micro for name in losses), sums)
        n_positions += batch.n_positions
        held.clear()  # nothing of a microbatch but its graph outlives its losses
        del batch, parts
        with summed_gradients(trained, d.dist) if micro == n_micro - 1 else nullcontext():
            (sums * weights / both[1]).sum().backward()
        totals.append(both)
        del sums
    all_sums, all_counts = torch.stack(totals).sum(0)
    return dict(zip(losses, all_sums / all_counts, strict=True)), observed, n_positions


def _stack(numbers: Iterable[float | Tensor], like: Tensor) -> Float[Tensor, "n"]:
    # Numbers are filled in, for a copy from the host would wait for the device.
    return torch.stack([n if isinstance(n, Tensor) else like.new_full((), n) for n in numbers])


def scheduled(config: RunConfig, step: int) -> Scheduled:
    """The weight of every loss, and every p, at a step (0-based)."""
    losses, steps = config.losses.configured(), config.train.steps
    coeffs = {name: schedule_value(loss.coeff, step, steps) for name, loss in losses.items()}
    return Scheduled(coeffs, annealed_ps(losses, step / steps))


def schedules(config: RunConfig, step: int) -> dict[str, float]:
    """Everything that changes over training by plan, by its name in metrics.jsonl."""
    now, losses = scheduled(config, step), config.losses.configured()
    values = {"schedule/lr": schedule_value(config.train.lr, step, config.train.steps)}
    varied = {n: c for n, c in now.coeffs.items() if not isinstance(losses[n].coeff, float)}
    values |= {f"schedule/coeff/{name}": coeff for name, coeff in varied.items()}
    return values | {f"schedule/p/{name}": p for name, p in now.p.items()}
