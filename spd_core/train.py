"""The training loop: from a config to a trained decomposition."""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
from spd_core.fast import graph, overlap
from spd_core.losses.distance import faithfulness
from spd_core.metrics import Sums, means
from spd_core.metrics.ci import PositionsAgo, l0_sums, never_important, observe_alive
from spd_core.parts import check_parts
from spd_core.run_dir import RunDir, append_metrics, truncate_metrics, write_atomic
from spd_core.step import schedules
from spd_core.targets.train_target import load_or_train_target

AfterStep = Callable[[int, dict[str, float]], bool]
MAX_REWINDS = 3  # to one checkpoint


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
    parameters, decay = list(model.trained_parameters().values()), config.train.weight_decay
    lr, on_gpu = config.train.lr.start, parameters[0].is_cuda
    if on_gpu:  # where a recorded step finds it
        lr = torch.tensor(lr, device=parameters[0].device)
    return torch.optim.AdamW(parameters, lr, weight_decay=decay, fused=True, capturable=on_gpu)


@dataclass(frozen=True)
class Training(Decomposition):
    """A decomposition with all that changes from step to step."""

    optimizer: torch.optim.AdamW
    positions_ago: PositionsAgo
    rewinds: list[int]  # of the run to each planned checkpoint, the first being step 0


def train(
    config: RunConfig, run_dir: RunDir, dist: Dist, after_step: AfterStep
) -> Literal["finished", "stopped"]:
    """Run, or continue, one decomposition; every rank calls this.

    Continues from the newest valid checkpoint. `after_step` is told on every rank how many steps
    are done, and what was logged after the last one (mostly nothing); where one says yes, all save
    together, several ranks after one step more, and the result is "stopped".

    Raises:
        ValueError: the config does not fit the target.
        FloatingPointError: a loss is not finite, and `train.on_nan` or `MAX_REWINDS` ends the run.
    """
    check_parts(config)
    outcome, stance = "rewind", "force_eager" if config.train.compile == "off" else "default"
    while outcome == "rewind":
        with ThreadPoolExecutor(1) as writer, torch.compiler.set_stance(stance):
            outcome = _loop(*_start(config, run_dir, dist), run_dir, writer, after_step)
    distributed.barrier(dist)  # the last checkpoint is whole for all
    return outcome


def _start(config: RunConfig, run_dir: RunDir, dist: Dist) -> tuple[Training, int]:
    """Continue from the newest valid checkpoint, else start; returns the steps done as well.

    What rank 0 found holds for all: a slow network file system may show others something else.
    """
    console = Console(quiet=not dist.is_main)
    model = build_model(config, run_dir.targets, dist, console)
    check_metrics(config, model)
    optimizer = build_optimizer(config, model)
    ago = never_important(config.eval.metrics.alive_components, model)
    n_planned = config.train.steps // config.checkpoint.every_steps
    found = torch.zeros(2 + n_planned, dtype=torch.int, device=dist.device)
    if dist.is_main:
        found[0], damaged = checkpoint.newest_valid_step(run_dir)
        for folder, problem in damaged.items():
            console.print(f"[yellow]{problem}: set aside", soft_wrap=True)
            checkpoint.set_aside(folder)
        checkpoint.drop_old(run_dir, int(found[0]), config.checkpoint)
        if run_dir.rewinds_file.exists():
            found[1:] = torch.tensor(json.loads(run_dir.rewinds_file.read_text()))
        truncate_metrics(run_dir, int(found[0]))
    distributed.broadcast(found, dist)
    step, *rewinds = found.tolist()
    t = Training(config, model, dist, run_dir.data, optimizer, ago, rewinds)
    if step == 0:
        if config.decompose.start == "examples":
            start_from_examples(t)
        faithfulness_warm_up(config, model)
    else:
        folder = run_dir.checkpoints / f"step_{step}"
        extra = checkpoint.load_checkpoint(folder, model, optimizer)
        for key in ago.keys() & extra.keys():  # none if the metric was off until now
            ago[key].copy_(extra[key])
        console.print(f"continuing from step {step} ({folder})", soft_wrap=True)
    parameters = [parameter.data for parameter in model.trained_parameters().values()]
    moments = [moment for of_one in optimizer.state.values() for moment in of_one.values()]
    for tensor in [*ago.values(), *parameters, *moments]:
        distributed.broadcast(tensor, dist)
    return t, step


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
    t: Training, step: int, run_dir: RunDir, writer: ThreadPoolExecutor, after_step: AfterStep
) -> Literal["finished", "stopped", "rewind"]:
    config, dist, steps = t.config, t.dist, t.config.train.steps
    alive, l0 = config.eval.metrics.alive_components, config.eval.metrics.ci_l0
    save = checkpoint.save_checkpoint

    def observe(batch: Batch, logged: bool) -> Sums:
        if alive is not None:
            observe_alive(t.positions_ago, batch.ci, alive, dist)
        return l0_sums(batch.ci, l0) if l0 is not None and logged else {}

    take_step, on_any_rank = graph.step_taker(t, t.optimizer, observe), overlap.AnyRank(dist)
    writing, saving_s, stopping = writer.submit(lambda: None), 0.0, False
    timed_from, started = step, time.perf_counter()
    while step < steps and not stopping:
        # ---- one optimisation step; from then on `step` counts the steps done
        logged = (step + 1) % config.track.log_every == 0 or step + 1 in (1, steps)
        draw = step + steps * t.rewinds[step // config.checkpoint.every_steps]
        result = take_step(step, draw, logged)
        step += 1
        due, values = due_metrics(config, step), dict[str, float]()

        # ---- rare events
        if logged or due:
            distributed.synchronise(dist.device)
            step_s = (time.perf_counter() - started) / (step - timed_from)  # of training alone
            if logged:
                values = result.values() | means(over_ranks("sum", result.observed, dist))
                if _must_go_back(t, values, step, run_dir, writing):
                    return "rewind"
                unit = "tokens" if result.n_positions > config.train.batch_size else "examples"
                values[f"{unit}_per_s"] = result.n_positions / step_s
                values["checkpoint_cost_s"], saving_s = saving_s, 0.0
                values |= schedules(config, step - 1)
            if due:
                figures = run_dir.figures / f"step_{step}"
                values |= evaluate(t, step, due, t.positions_ago, step_s, figures)
            if dist.is_main:
                append_metrics(run_dir, {"step": step, **values})
        stopping = on_any_rank(after_step(step, values))
        saving = stopping or step % config.checkpoint.every_steps == 0 or step == steps
        if saving:
            if _must_go_back(t, result.values(), step, run_dir, writing):
                return "rewind"
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
    return "finished" if step == steps else "stopped"


def _must_go_back(
    t: Training, values: dict[str, float], step: int, run_dir: RunDir, writing: Future
) -> bool:
    """Whether a value is not finite, on any rank, and other batches may help.

    From then on the run is a function of its seed and `rewinds.json`; what stops saved since goes.
    """
    if not distributed.any_rank(not all(abs(v) < float("inf") for v in values.values()), t.dist):
        return False
    writing.result()  # a checkpoint on its way counts as saved
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    saved, every = checkpoint.checkpoint_steps(run_dir), t.config.checkpoint.every_steps
    problem = f"not finite at step {step}: {numbers}; last checkpoints: {saved}"
    planned = (step - 1) // every
    if t.config.train.on_nan == "stop" or t.rewinds[planned] == MAX_REWINDS:
        raise FloatingPointError(f"{problem}; lower train.lr.start, or clip with train.grad_clip")
    t.rewinds[planned] += 1
    if t.dist.is_main:
        for of_stop in (s for s in saved if s > planned * every):
            shutil.rmtree(run_dir.checkpoints / f"step_{of_stop}")
        write_atomic(run_dir.rewinds_file, json.dumps(t.rewinds))
        print(f"{problem}; back to step {planned * every}, and on with other batches", flush=True)
    return True
