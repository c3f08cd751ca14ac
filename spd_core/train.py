"""The training loop: from a config to a trained decomposition."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from spd_core import checkpoint, distributed
from spd_core.component_model import ComponentModel
from spd_core.config import RunConfig
from spd_core.data.batches import Batch, Decomposition
from spd_core.data.start import start_from_examples
from spd_core.distributed import Dist, over_ranks
from spd_core.evaluate import check_metrics, due_metrics, evaluate
from spd_core.losses.distance import faithfulness
from spd_core.metrics import Sums, add, means
from spd_core.metrics.ci import PositionsAgo, l0_sums, never_important, observe_alive
from spd_core.parts import check_parts
from spd_core.run_dir import RunDir, append_metrics, truncate_metrics
from spd_core.step import optimisation_step, schedules
from spd_core.targets.train_target import load_or_train_target

AfterStep = Callable[[int, dict[str, float]], bool]


def build_model(config: RunConfig, targets: Path, dist: Dist, console: Console) -> ComponentModel:
    """The target from the store (trained first if need be) with fresh components beside it."""
    target = load_or_train_target(config, targets, console)
    model = ComponentModel(target.module, config.decompose, config.seed, target.output)
    n_trained = sum(p.numel() for p in model.trained_parameters().values())
    seed = "" if target.seed is None else f" of seed {target.seed}"
    modules = ", ".join(f"{name} C={c.C}" for name, c in model.components.items())
    console.print(
        f"{config.target.kind} target{seed}; {modules}; {n_trained:,} trained parameters; "
        f"batch {config.train.batch_size // dist.world_size} per rank x {dist.world_size}",
        soft_wrap=True,
    )
    return model.to(dist.device)


def build_optimizer(config: RunConfig, model: ComponentModel) -> torch.optim.AdamW:
    parameters, decay = model.trained_parameters().values(), config.train.weight_decay
    return torch.optim.AdamW(parameters, config.train.lr.start, weight_decay=decay, fused=True)


@dataclass(frozen=True)
class Training(Decomposition):
    """A decomposition with all that changes from step to step."""

    optimizer: torch.optim.AdamW
    positions_ago: PositionsAgo


def train(
    config: RunConfig, run_dir: RunDir, dist: Dist, after_step: AfterStep
) -> Literal["finished", "stopped"]:
    """Run, or continue, one decomposition; every rank calls this.

    Continues from the newest valid checkpoint. `after_step` is told on every rank how many steps
    are done, and what was logged after the last one (mostly nothing); where one says yes, all save
    together and the result is "stopped".

    Raises:
        ValueError: the config does not fit the target.
        FloatingPointError: a loss is not finite at a logged step.
    """
    console = Console(quiet=not dist.is_main)
    check_parts(config)
    model = build_model(config, run_dir.targets, dist, console)
    check_metrics(config, model)
    ago = never_important(config.eval.metrics.alive_components, model)
    t = Training(config, model, dist, run_dir.data, build_optimizer(config, model), ago)
    first = _start(t, run_dir, console)
    if dist.is_main:
        truncate_metrics(run_dir, first)
    with ThreadPoolExecutor(1) as writer:
        outcome = _loop(t, run_dir, writer, first, after_step)
    distributed.barrier(dist)  # the last checkpoint is whole for all
    return outcome


def _start(t: Training, run_dir: RunDir, console: Console) -> int:
    """Continue from the newest valid checkpoint, else start with the faithfulness warm-up.

    Returns the number of steps done. What rank 0 found holds for all: a slow network file system
    may show others something else.
    """
    newest = torch.tensor(0, device=t.dist.device)
    if t.dist.is_main:
        found, damaged = checkpoint.newest_valid_step(run_dir)
        newest.fill_(found)
        for folder, problem in damaged.items():
            console.print(f"[yellow]{problem}: set aside", soft_wrap=True)
            checkpoint.set_aside(folder)
    distributed.broadcast(newest, t.dist)
    step = int(newest)
    if step == 0:
        if t.config.decompose.start == "examples":
            start_from_examples(t)
        faithfulness_warm_up(t.config, t.model)
    else:
        folder = run_dir.checkpoints / f"step_{step}"
        extra = checkpoint.load_checkpoint(folder, t.model, t.optimizer)
        for key in t.positions_ago.keys() & extra.keys():  # none if the metric was off until now
            t.positions_ago[key].copy_(extra[key])
        console.print(f"continuing from step {step} ({folder})", soft_wrap=True)
    state = [*t.positions_ago.values()]
    for parameter in t.model.trained_parameters().values():
        state += [parameter.data, *t.optimizer.state[parameter].values()]
    for tensor in state:
        distributed.broadcast(tensor, t.dist)
    return step


def faithfulness_warm_up(config: RunConfig, model: ComponentModel) -> None:
    """Fit V U to the target weights before training; the same arithmetic on every rank."""
    parameters, warmup = model.component_parameters(), config.train.faithfulness_warmup
    optimizer = torch.optim.AdamW(parameters, warmup.lr, weight_decay=warmup.weight_decay)
    for _ in range(warmup.steps):
        sum_, count = faithfulness(model.components)
        optimizer.zero_grad(set_to_none=True)
        (sum_ / count).backward()
        optimizer.step()


def _loop(
    t: Training, run_dir: RunDir, writer: ThreadPoolExecutor, step: int, after_step: AfterStep
) -> Literal["finished", "stopped"]:
    config, dist, steps = t.config, t.dist, t.config.train.steps
    alive, l0 = config.eval.metrics.alive_components, config.eval.metrics.ci_l0
    save, l0_of_step = checkpoint.save_checkpoint, Sums()

    def observe(batch: Batch) -> None:
        if alive is not None:
            observe_alive(t.positions_ago, batch.ci, alive, dist)
        if l0 is not None and logged:
            add(l0_of_step, l0_sums(batch.ci, l0))

    writing, saving_s = writer.submit(lambda: None), 0.0
    timed_from, started = step, time.perf_counter()
    while step < steps:
        # ---- one optimisation step; from then on `step` counts the steps done
        logged = (step + 1) % config.track.log_every == 0 or step + 1 in (1, steps)
        result = optimisation_step(t, t.optimizer, step, observe)
        step += 1
        due, values = due_metrics(config, step), dict[str, float]()

        # ---- rare events
        if logged or due:
            distributed.synchronise(dist.device)
            step_s = (time.perf_counter() - started) / (step - timed_from)  # of training alone
            if logged:
                values = result.values() | means(over_ranks("sum", l0_of_step, dist))
                l0_of_step.clear()
                _check_finite(values, step, run_dir)
                unit = "tokens" if result.n_positions > config.train.batch_size else "examples"
                values[f"{unit}_per_s"] = result.n_positions / step_s
                values["checkpoint_cost_s"], saving_s = saving_s, 0.0
                values |= schedules(config, step - 1)
            if due:
                figures = run_dir.figures / f"step_{step}"
                values |= evaluate(t, step, due, t.positions_ago, step_s, figures)
            if dist.is_main:
                append_metrics(run_dir, {"step": step, **values})
        stopping = distributed.any_rank(after_step(step, values), dist)
        saving = stopping or step % config.checkpoint.every_steps == 0 or step == steps
        if saving:
            _check_finite(result.values(), step, run_dir)
            began, extra = time.perf_counter(), over_ranks("min", t.positions_ago, dist)
            if dist.is_main:
                writing.result()  # one after the other
                state = checkpoint.training_state(t.model, t.optimizer, extra)
                writing = writer.submit(save, run_dir, step, state, config.checkpoint)
            saving_s += time.perf_counter() - began
        if writing.done() or stopping or step == steps:
            writing.result()  # what cannot be written ends the run
        if logged or due or saving:
            timed_from, started = step, time.perf_counter()
        if stopping and step < steps:
            return "stopped"
    return "finished"


def _check_finite(values: dict[str, float], step: int, run_dir: RunDir) -> None:
    if all(abs(value) < float("inf") for value in values.values()):
        return
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    saved = checkpoint.checkpoint_steps(run_dir)
    raise FloatingPointError(
        f"not finite at step {step}: {numbers}. The last checkpoint is "
        f"{f'of step {saved[-1]}' if saved else 'still to come'}; "
        "lower train.lr.start, or clip with train.grad_clip"
    )
