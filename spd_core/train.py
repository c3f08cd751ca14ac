"""The training loop: from a config to a trained decomposition."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from spd_core import checkpoint, distributed
from spd_core.component_model import ComponentModel
from spd_core.config import RunConfig
from spd_core.distributed import Dist
from spd_core.evaluate import check_metrics, due_metrics, evaluate
from spd_core.losses.faithfulness import faithfulness
from spd_core.metrics.training import AliveComponents, CiObserver
from spd_core.parts import check_parts
from spd_core.run_dir import RunDir, Status, truncate_metrics, write_status
from spd_core.step import optimisation_step, schedules
from spd_core.targets.train_target import load_or_train_target
from spd_core.tracking import Tracker, write_environment

HEARTBEAT_S = 10.0


def build_model(config: RunConfig, targets: Path, dist: Dist, console: Console) -> ComponentModel:
    """The target from the store (trained first if need be) with fresh components beside it."""
    target = load_or_train_target(config, targets, console)
    model = ComponentModel(target.module, config.decompose, config.seed, target.output)
    model = model.to(dist.device)
    if dist.is_main:
        n_trained = sum(p.numel() for p in model.trained_parameters().values())
        seed = "" if target.seed is None else f" of seed {target.seed}"
        modules = ", ".join(f"{name} C={c.C}" for name, c in model.components.items())
        console.print(
            f"{config.target.kind} target{seed}; {modules}; {n_trained:,} trained parameters; "
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
            now, host = time.time(), socket.gethostname()
            fields = {"attempt": self.attempt, "job_id": self.job_id, "host": host}
            fields |= {"state": state, "step": self.step, "steps": self.steps, "heartbeat": now}
            write_status(self.run_dir, Status.model_validate(fields))


@dataclass(frozen=True)
class Training:
    """One decomposition in progress, on one rank."""

    config: RunConfig
    run_dir: RunDir
    dist: Dist
    model: ComponentModel
    optimizer: torch.optim.AdamW
    alive: AliveComponents | None


@dataclass
class Stopwatch:
    """Seconds spent in training steps alone, without logging, evaluations and checkpoints."""

    device: torch.device
    n_steps: int = 0
    seconds: float = 0.0
    _started: float | None = None
    _last: tuple[int, float] = (0, 0.0)

    def start(self) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        if self._started is not None:
            distributed.synchronise(self.device)
            self.seconds += time.perf_counter() - self._started
            self._started = None

    def step_s(self) -> float:
        return self.seconds / self.n_steps

    def recent_step_s(self) -> float:
        """Of the steps since the last call."""
        n, seconds = self.n_steps - self._last[0], self.seconds - self._last[1]
        self._last = (self.n_steps, self.seconds)
        return seconds / n


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
    status = StatusWriter(run_dir, dist.is_main, config.train.steps, attempt, job_id)
    status.write("running")
    try:
        return _train(config, run_dir, dist, should_stop, status)
    except BaseException:
        # Whatever ended the run, its status must say so; the error itself goes on.
        status.write("failed")
        raise


def _train(
    config: RunConfig,
    run_dir: RunDir,
    dist: Dist,
    should_stop: Callable[[], bool],
    status: StatusWriter,
) -> Literal["finished", "stopped"]:
    console = Console(quiet=not dist.is_main)
    check_parts(config)
    model = build_model(config, run_dir.targets, dist, console)
    check_metrics(config, model)
    alive = AliveComponents.start(config.eval.metrics.alive_components, model)
    training = Training(config, run_dir, dist, model, build_optimizer(config, model), alive)
    status.step = _restore_or_warm_up(training, console)
    _agree(status.step, model, dist)
    status.write("running")
    if dist.is_main:
        write_environment(run_dir)
        truncate_metrics(run_dir, status.step)
    distributed.barrier(dist)
    if not dist.is_main:
        return _loop(training, should_stop, status, None)
    with Tracker(config, run_dir, console, status.step) as tracker:
        return _loop(training, should_stop, status, tracker)


def _restore_or_warm_up(t: Training, console: Console) -> int:
    """Continue from the newest valid checkpoint, else start with the faithfulness warm-up."""
    if not checkpoint.checkpoint_steps(t.run_dir):
        faithfulness_warm_up(t.config, t.model)
        distributed.barrier(t.dist)
        return 0
    folder, step, damaged = checkpoint.newest_valid_checkpoint(t.run_dir)
    distributed.barrier(t.dist)  # every rank has looked before rank 0 moves anything
    for damaged_folder, problem in damaged.items():
        console.print(f"[yellow]{problem}: set aside", soft_wrap=True)
        if t.dist.is_main:
            checkpoint.set_aside(damaged_folder)
    extra = checkpoint.load_checkpoint(folder, t.model, t.optimizer)
    if t.alive is not None:
        t.alive.load(extra)
    console.print(f"continuing from step {step} ({folder})", soft_wrap=True)
    return step


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
    t: Training, should_stop: Callable[[], bool], status: StatusWriter, tracker: Tracker | None
) -> Literal["finished", "stopped"]:
    config, dist, step, steps = t.config, t.dist, status.step, t.config.train.steps
    watch, last_heartbeat = Stopwatch(dist.device), time.monotonic()
    while step < steps:
        # ---- one optimisation step; from here on `step` counts the steps done
        logged = (step + 1) % config.track.log_every == 0 or step + 1 in (1, steps)
        observer = CiObserver(config.eval.metrics.ci_l0 if logged else None, t.alive, dist)
        watch.start()
        result = optimisation_step(config, t.model, t.optimizer, dist, step, observer.observe)
        watch.n_steps += 1
        scheduled = schedules(config, step)
        step = status.step = step + 1
        if logged:
            watch.stop()
            values = result.values() | observer.ci_l0()
            _check_finite(values, step)
            unit = "tokens" if result.n_positions > config.train.batch_size else "examples"
            values[f"{unit}_per_s"] = result.n_positions / watch.recent_step_s()
            if tracker is not None:
                tracker.log(step, values | scheduled)

        # ---- rare events
        if due := due_metrics(config, step):
            watch.stop()
            figures = t.run_dir.figures / f"step_{step}"
            metrics = evaluate(config, t.model, step, due, t.alive, watch.step_s(), dist, figures)
            if tracker is not None:
                tracker.log(step, metrics)
        stopping = distributed.any_rank(should_stop(), dist)
        if stopping or step % config.checkpoint.every_steps == 0 or step == steps:
            watch.stop()
            _check_finite({n: norm.item() for n, norm in result.grad_norms.items()}, step)
            extra = {} if t.alive is None else t.alive.tensors(dist)
            if dist.is_main:
                keep = config.checkpoint.keep
                checkpoint.save_checkpoint(t.run_dir, step, t.model, t.optimizer, extra, keep)
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


def _check_finite(values: dict[str, float], step: int) -> None:
    bad = {name: value for name, value in values.items() if not abs(value) < float("inf")}
    if bad:
        raise FloatingPointError(
            f"not finite at step {step}: {bad}; the last checkpoint is untouched. "
            "Lower train.lr.start, or clip with train.grad_clip"
        )
