"""The training loop: from a config to a trained decomposition."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from spd_core import checkpoint, distributed
from spd_core.component_model import ComponentModel
from spd_core.config import RunConfig
from spd_core.distributed import Dist
from spd_core.evaluate import check_metric_modules, evaluate, make_batch
from spd_core.losses import Batch, configured, loss_parts
from spd_core.losses.faithfulness import faithfulness
from spd_core.randomness import StepRandomness
from spd_core.run_dir import RunDir, Status, truncate_metrics, write_status
from spd_core.schedule import coefficient, schedule_value
from spd_core.targets.train_target import load_or_train_target
from spd_core.tracking import Tracker, write_environment

HEARTBEAT_S = 10.0


def build_model(config: RunConfig, targets: Path, dist: Dist, console: Console) -> ComponentModel:
    """The target from the store (trained first if need be) with fresh components beside it."""
    target, target_seed = load_or_train_target(config, targets, console)
    model = ComponentModel(target, config.decompose, config.seed).to(dist.device)
    if dist.is_main:
        n_trained = sum(p.numel() for p in model.trained_parameters().values())
        modules = ", ".join(f"{name} C={c.C}" for name, c in model.components.items())
        console.print(
            f"target seed {target_seed}; {modules}; {n_trained:,} trained parameters; "
            f"batch {config.train.batch_size // dist.world_size} per rank x {dist.world_size}",
            soft_wrap=True,
        )
    return model


def build_optimizer(config: RunConfig, model: ComponentModel) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        list(model.trained_parameters().values()),
        lr=config.train.lr.start,
        weight_decay=config.train.weight_decay,
        fused=True,
    )


@dataclass
class StatusWriter:
    """Keeps status.json (rank 0 only); `step` is where the run stands, also when it fails."""

    run_dir: RunDir
    is_main: bool
    steps: int
    attempt: int
    job_id: str | None
    step: int = 0

    def write(self, state: Literal["running", "stopped", "finished", "failed"]) -> None:
        if self.is_main:
            write_status(
                self.run_dir,
                Status(
                    state=state,
                    step=self.step,
                    steps=self.steps,
                    heartbeat=time.time(),
                    attempt=self.attempt,
                    job_id=self.job_id,
                    host=socket.gethostname(),
                ),
            )


def train(
    config: RunConfig,
    run_dir: RunDir,
    dist: Dist,
    should_stop: Callable[[], bool],
    attempt: int,
    job_id: str | None,
) -> Literal["finished", "stopped"]:
    """Run, or continue, one decomposition; every rank calls this.

    Continues from the newest valid checkpoint. `should_stop` is asked on every rank after each
    step; where one says yes, all save together and the result is "stopped".

    Raises:
        ValueError: the config does not fit the target.
        FloatingPointError: a loss is not finite at a logged step.
    """
    console = Console(quiet=not dist.is_main)
    status = StatusWriter(run_dir, dist.is_main, config.train.steps, attempt, job_id)
    status.write("running")
    try:
        model = build_model(config, run_dir.targets, dist, console)
        check_metric_modules(config, model)
        optimizer = build_optimizer(config, model)
        status.step = _restore_or_warm_up(config, run_dir, model, optimizer, dist, console)
        _agree(status.step, model, dist)
        status.write("running")
        if dist.is_main:
            write_environment(run_dir)
            truncate_metrics(run_dir, status.step)
        distributed.barrier(dist)
        if not dist.is_main:
            return _loop(config, run_dir, model, optimizer, dist, should_stop, status, None)
        with Tracker(config, run_dir, console, status.step) as tracker:
            return _loop(config, run_dir, model, optimizer, dist, should_stop, status, tracker)
    except BaseException:
        # Whatever ended the run, its status must say so; the error itself goes on.
        status.write("failed")
        raise


def _restore_or_warm_up(
    config: RunConfig,
    run_dir: RunDir,
    model: ComponentModel,
    optimizer: torch.optim.AdamW,
    dist: Dist,
    console: Console,
) -> int:
    """Continue from the newest valid checkpoint, else start with the faithfulness warm-up."""
    if checkpoint.checkpoint_steps(run_dir):
        folder, step, damaged = checkpoint.newest_valid_checkpoint(run_dir)
        distributed.barrier(dist)  # every rank has looked before rank 0 moves anything
        for damaged_folder, problem in damaged.items():
            console.print(f"[yellow]{problem}: set aside", soft_wrap=True)
            if dist.is_main:
                checkpoint.set_aside(damaged_folder)
        checkpoint.load_checkpoint(folder, model, optimizer)
        console.print(f"continuing from step {step} ({folder})", soft_wrap=True)
        return step
    faithfulness_warm_up(config, model)
    distributed.barrier(dist)
    return 0


def _agree(step: int, model: ComponentModel, dist: Dist) -> None:
    """All ranks start from rank 0's weights, at one step.

    Raises:
        RuntimeError: a rank saw another checkpoint, as a slow network file system can cause.
    """
    main_step = torch.tensor(step, device=dist.device)
    distributed.broadcast(main_step, dist)
    if int(main_step) != step:
        raise RuntimeError(
            f"rank {dist.rank} found step {step}, rank 0 step {int(main_step)}; resume the run"
        )
    for parameter in model.trained_parameters().values():
        distributed.broadcast(parameter.data, dist)


def faithfulness_warm_up(config: RunConfig, model: ComponentModel) -> None:
    """Fit V U to the target weights before training; the same arithmetic on every rank."""
    warmup = config.train.faithfulness_warmup
    optimizer = torch.optim.AdamW(
        model.component_parameters(), lr=warmup.lr, weight_decay=warmup.weight_decay
    )
    for _ in range(warmup.steps):
        sum_, count = faithfulness(model.components)
        optimizer.zero_grad(set_to_none=True)
        (sum_ / count).backward()
        optimizer.step()


def _loop(
    config: RunConfig,
    run_dir: RunDir,
    model: ComponentModel,
    optimizer: torch.optim.AdamW,
    dist: Dist,
    should_stop: Callable[[], bool],
    status: StatusWriter,
    tracker: Tracker | None,
) -> Literal["finished", "stopped"]:
    step, steps = status.step, config.train.steps
    last_heartbeat = time.monotonic()
    while step < steps:
        # ---- one optimisation step; from here on `step` counts the steps done
        started = time.perf_counter()
        losses, total, norms = optimisation_step(config, model, optimizer, dist, step)
        lr = schedule_value(config.train.lr, step, steps)
        step = status.step = step + 1
        if step % config.track.log_every == 0 or step in (1, steps):
            values = {f"loss/{name}": value.item() for name, value in losses.items()}
            values |= {"loss/total": total.item()}
            _check_finite(values, step)
            values |= {f"grad_norm/{name}": norm.item() for name, norm in norms.items()}
            values["lr"] = lr
            values["examples_per_s"] = config.train.batch_size / (time.perf_counter() - started)
            if tracker is not None:
                tracker.log(step, values)

        # ---- rare events
        if step % config.eval.every == 0 or step == steps:
            slow = step % config.eval.slow_every == 0 or step == steps
            started = time.perf_counter()
            metrics = evaluate(
                config,
                model,
                step,
                "slow" if slow else "fast",
                dist,
                run_dir.figures / f"step_{step}",
            )
            if tracker is not None:
                tracker.log(step, metrics | {"eval/seconds": time.perf_counter() - started})
        stopping = distributed.any_rank(should_stop(), dist)
        if stopping or step % config.checkpoint.every_steps == 0 or step == steps:
            _check_finite({f"grad_norm/{n}": norm.item() for n, norm in norms.items()}, step)
            if dist.is_main:
                checkpoint.save_checkpoint(run_dir, step, model, optimizer, config.checkpoint.keep)
            distributed.barrier(dist)
        if tracker is not None:
            tracker.advance(step)
        if stopping and step < steps:
            status.write("stopped")
            return "stopped"
        if time.monotonic() - last_heartbeat > HEARTBEAT_S:
            last_heartbeat = time.monotonic()
            status.write("running")
    status.write("finished")
    return "finished"


def optimisation_step(
    config: RunConfig,
    model: ComponentModel,
    optimizer: torch.optim.AdamW,
    dist: Dist,
    step: int,
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """One step: losses by name (over all ranks), their weighted sum, and gradient norms.

    Reads nothing back from the device, so that a GPU is never waited for.
    """
    steps = config.train.steps
    randomness = StepRandomness(
        config.seed, step, dist.rank, dist.world_size, config.train.batch_size, dist.device
    )
    batch = make_batch(config, model, randomness, "train")
    losses, weighted = weighted_losses(config, model, batch, step, dist)
    optimizer.zero_grad(set_to_none=True)
    weighted.backward()
    distributed.sum_gradients(model.trained_parameters().values(), dist)
    clip = config.train.grad_clip
    norms = {
        "components": _clip(model.component_parameters(), clip.components),
        "ci_fns": _clip(model.ci_fn_parameters(), clip.ci_fns),
    }
    for group in optimizer.param_groups:
        group["lr"] = schedule_value(config.train.lr, step, steps)
    optimizer.step()
    total = sum(
        (
            coefficient(loss.coeff, step, steps) * losses[name]
            for name, loss in configured(config.losses).items()
        ),
        start=weighted.new_zeros(()),
    )
    return losses, total, norms


def weighted_losses(
    config: RunConfig, model: ComponentModel, batch: Batch, step: int, dist: Dist
) -> tuple[dict[str, Tensor], Tensor]:
    """The losses over all ranks (detached), and this rank's share of their weighted sum."""
    steps = config.train.steps
    parts = {
        name: loss_parts(name, loss, model, batch, step, steps, dist)
        for name, loss in configured(config.losses).items()
    }
    local = torch.stack([sum_.detach() for sum_, _ in parts.values()])
    counts = local.new_tensor([float(count) for _, count in parts.values()])
    sums, counts = distributed.all_sum(torch.stack([local, counts]), dist)
    losses = dict(zip(parts, sums / counts, strict=True))
    weighted = sum(
        (
            coefficient(loss.coeff, step, steps) * parts[name][0] / counts[i]
            for i, (name, loss) in enumerate(configured(config.losses).items())
        ),
        start=local.new_zeros(()),
    )
    return losses, weighted


def _clip(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Clip in place and return the norm before clipping."""
    return nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)


def _check_finite(values: dict[str, float], step: int) -> None:
    bad = {name: value for name, value in values.items() if not abs(value) < float("inf")}
    if bad:
        raise FloatingPointError(
            f"not finite at step {step}: {bad}; the last checkpoint is untouched. "
            "Lower train.lr.start, or clip with train.grad_clip"
        )
