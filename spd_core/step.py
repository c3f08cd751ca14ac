"""One optimisation step: batches to losses, losses to gradients, gradients to new weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_core import distributed
from spd_core.ci_fns import CausalImportance
from spd_core.component_model import ComponentModel
from spd_core.config import RunConfig
from spd_core.config.losses import ImportanceMinimalityConfig
from spd_core.data.batches import Batch, Batches, autocast, training_batches
from spd_core.distributed import Dist
from spd_core.losses import Step, loss_parts, prepare_step
from spd_core.schedule import annealed_p, coefficient, schedule_value

ObserveCi = Callable[[dict[str, CausalImportance]], None]


@dataclass(frozen=True)
class StepResult:
    """What one step reports; it stays on the device, so that a GPU is never waited for."""

    losses: dict[str, Float[Tensor, ""]]
    total: Float[Tensor, ""]
    grad_norms: dict[str, Float[Tensor, ""]]
    n_positions: int

    def values(self) -> dict[str, float]:
        """Everything by its name in metrics.jsonl; reads from the device."""
        values = {f"loss/{name}": value.item() for name, value in self.losses.items()}
        values["loss/total"] = self.total.item()
        norms = {f"grad_norm_before_clip/{n}": norm.item() for n, norm in self.grad_norms.items()}
        return values | norms


def optimisation_step(
    config: RunConfig,
    model: ComponentModel,
    optimizer: torch.optim.AdamW,
    dist: Dist,
    step: int,
    observe: ObserveCi,
) -> StepResult:
    """Step number `step` (0-based); `observe` sees the importances of every microbatch.

    Losses are over all ranks and microbatches, norms over the whole gradient before clipping.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast(config, dist.device):
        batches, n_micro = training_batches(config, model, step, dist)
    losses, n_positions = accumulate_gradients(config, model, batches, n_micro, step, dist, observe)
    distributed.sum_gradients(model.trained_parameters().values(), dist)
    clip = config.train.grad_clip
    norms = {
        "components": _clip(model.component_parameters(), clip.components),
        "ci_fns": _clip(model.ci_fn_parameters(), clip.ci_fns),
    }
    for group in optimizer.param_groups:
        group["lr"] = schedule_value(config.train.lr, step, config.train.steps)
    optimizer.step()
    coeffs = coefficients(config, step)
    total = torch.stack([coeffs[name] * loss for name, loss in losses.items()]).sum()
    return StepResult(losses, total, norms, n_positions * dist.world_size)


def accumulate_gradients(
    config: RunConfig,
    model: ComponentModel,
    batches: Batches,
    n_micro: int,
    step: int,
    dist: Dist,
    observe: ObserveCi,
) -> tuple[dict[str, Float[Tensor, ""]], int]:
    """Add this rank's gradient of the weighted losses to `.grad`.

    Returns the losses over all ranks (detached), and this rank's number of positions.
    """
    losses = config.losses.configured()
    with autocast(config, dist.device):
        whole = prepare_step(losses, model, batches, n_micro, step / config.train.steps, dist)
    totals, n_positions, counts = [], 0, None
    # Nothing of a microbatch but its gradient outlives its turn.
    parts_of_batch = iter(batches())
    for _ in range(n_micro):
        with autocast(config, dist.device):
            batch = next(parts_of_batch)
            observe(batch.ci)
            weighted, sums, local_counts = _weighted_losses(config, model, batch, whole, step)
        counts = local_counts if counts is None else counts
        _check_counts(list(losses), counts, local_counts)
        (weighted / n_micro).backward()
        totals.append(sums)
        n_positions += batch.n_positions
    sums, counts_sum = torch.stack(totals).sum(0)
    return dict(zip(losses, sums / counts_sum, strict=True)), n_positions


def _weighted_losses(
    config: RunConfig, model: ComponentModel, batch: Batch, whole: Step, step: int
) -> tuple[Float[Tensor, ""], Float[Tensor, "2 n_losses"], list[int]]:
    """This rank's share of the weighted sum, (sums, counts) over all ranks, and its own counts."""
    losses = config.losses.configured()
    parts = {n: loss_parts(n, loss, model, batch, whole) for n, loss in losses.items()}
    local_counts = [count for _, count in parts.values()]
    local = torch.stack([sum_.detach() for sum_, _ in parts.values()])
    both = torch.stack([local, local.new_tensor([float(n) for n in local_counts])])
    both = distributed.all_sum(both, whole.dist)
    coeffs = coefficients(config, step)
    shares = [coeffs[name] * sum_ / both[1, i] for i, (name, (sum_, _)) in enumerate(parts.items())]
    return torch.stack(shares).sum(), both, local_counts


def _check_counts(names: list[str], first: list[int], now: list[int]) -> None:
    for name, expected, count in zip(names, first, now, strict=True):
        if count != expected:
            raise ValueError(
                f"losses.{name} has count {count} in one microbatch and {expected} in another; "
                "such a loss needs train.microbatch_size=null"
            )


def coefficients(config: RunConfig, step: int) -> dict[str, float]:
    return {
        name: coefficient(loss.coeff, step, config.train.steps)
        for name, loss in config.losses.configured().items()
    }


def schedules(config: RunConfig, step: int) -> dict[str, float]:
    """Everything that changes over training by plan, by its name in metrics.jsonl."""
    values = {"schedule/lr": schedule_value(config.train.lr, step, config.train.steps)}
    coeffs = coefficients(config, step)
    for name, loss in config.losses.configured().items():
        if not isinstance(loss.coeff, float):
            values[f"schedule/coeff/{name}"] = coeffs[name]
        if isinstance(loss, ImportanceMinimalityConfig):
            values[f"schedule/p/{name}"] = annealed_p(loss, step / config.train.steps)
    return values


def _clip(parameters: list[nn.Parameter], max_norm: float | None) -> Float[Tensor, ""]:
    """Clip in place and return the norm before clipping."""
    return nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)
