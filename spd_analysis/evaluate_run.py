"""All metrics and figures of a run's config, at chosen checkpoints, on as much data as you like.

    python -m spd_analysis.evaluate_run RUN|LAUNCH ... [--step N ... | --all-steps]
        [--batch-size N] [--steps N] [--name NAME] [--processes N]

writes `evals/NAME.json` into each run's folder, and figures into `evals/NAME/step_N/`. Several
processes, here or under srun, share every batch; what comes out is the same.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from spd_analysis import command
from spd_analysis.launches import find_runs, rewritten, with_checkpoints
from spd_analysis.processes import joined, run_here
from spd_analysis.summary import columns_of, format_value
from spd_core.checkpoint import checkpoint_steps, load_model, newest_valid_checkpoint
from spd_core.config import load_config
from spd_core.data.batches import Decomposition
from spd_core.distributed import Dist, barrier
from spd_core.evaluate import evaluate
from spd_core.load import LoadedRun, load_run
from spd_core.run_dir import RunDir, write_atomic


@dataclass(frozen=True)
class Evaluation:
    """The content of `evals/NAME.json`; `checkpoints` is step -> metric -> value."""

    run: str
    name: str
    batch_size: int
    steps: int
    processes: int
    device: str
    torch: str
    time: str
    checkpoints: dict[int, dict[str, float]]


def evaluate_run(
    run_dir: RunDir,
    at_steps: Sequence[int],
    batch_size: int | None,
    n_batches: int | None,
    name: str,
    dist: Dist,
) -> Evaluation:
    """Evaluate a run at these checkpoints, on the first `n_batches` of its evaluation data.

    None is what the run's config says; every rank calls this, and rank 0 writes. Metrics are named
    as in metrics.jsonl; what they cost is in seconds.

    Raises:
        ValueError: a checkpoint is missing or damaged, or target or data cannot be had.
    """
    run = load_run(run_dir.path)
    set_ = {"batch_size": batch_size, "steps": n_batches}
    options = run.config.eval.model_copy(update={k: v for k, v in set_.items() if v is not None})
    if options.batch_size < dist.world_size:
        raise ValueError(
            f"--batch-size {options.batch_size} leaves some of {dist.world_size} processes empty"
        )
    config = run.config.model_copy(update={"eval": options})
    d = Decomposition(config, run.model.to(dist.device), dist, run_dir.data)
    checkpoints = {}
    folder = run_dir.path / "evals" / name
    for step in at_steps:
        tensors = load_checked(run_dir, step, run)
        # What of the training data was seen as alive; none where the metric is off.
        saved = {name: f"extra:{name}" for name in run.model.components}
        ago = {n: tensors[key].to(dist.device) for n, key in saved.items() if key in tensors}
        place = folder / f"step_{step}"
        with rewritten(place) if dist.is_main else nullcontext(place) as figures:
            metrics = config.eval.metrics.configured()
            values = evaluate(d, step, metrics, ago, 1.0, figures)
        checkpoints[step] = {k: v for k, v in values.items() if not k.startswith("eval_cost/steps")}
    evaluation = Evaluation(
        run_dir.path.name, name, options.batch_size, options.steps, dist.world_size,
        str(dist.device), torch.__version__, time.strftime("%Y-%m-%dT%H:%M:%S%z"), checkpoints,
    )  # fmt: skip
    if dist.is_main:
        text = json.dumps(asdict(evaluation), indent=1) + "\n"
        write_atomic(folder.with_name(f"{name}.json"), text)
        for old in folder.glob("step_*"):
            if int(old.name.removeprefix("step_")) not in checkpoints:
                shutil.rmtree(old)
    return evaluation


def load_checked(run_dir: RunDir, step: int, run: LoadedRun) -> dict[str, torch.Tensor]:
    """Put the checkpoint of a step into the run's model; returns all of its tensors.

    Raises:
        ValueError: there is none of this step, or it is damaged.
    """
    folder = run_dir.checkpoints / f"step_{step}"
    if step not in (steps := checkpoint_steps(run_dir)):
        kept = ", ".join(map(str, steps))
        raise ValueError(
            f"{run_dir.path} has no checkpoint of step {step}, only of {kept}: "
            "checkpoint.every_steps and checkpoint.keep say which are kept"
        )
    with open(folder / "state.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != json.loads((folder / "meta.json").read_text())["sha256"]:
        raise ValueError(f"{folder} is damaged: give another --step")
    return load_model(folder, run.model)


def read_evaluations(run_dir: RunDir) -> dict[str, Evaluation]:
    """Every evaluation of a run, by name."""
    found = {}
    for file in sorted((run_dir.path / "evals").glob("*.json")):
        record = json.loads(file.read_text())
        steps = {int(step): values for step, values in record.pop("checkpoints").items()}
        found[file.stem] = Evaluation(checkpoints=steps, **record)
    return found


def print_tables(evaluations: Sequence[Evaluation], console: Console) -> None:
    """A table for each metric: a row per run and checkpoint, a column per module or measure."""
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for evaluation in evaluations:
        for step, values in evaluation.checkpoints.items():
            for key, value in values.items():
                kind, *metric, column = key.split("/")
                if kind == "eval":
                    rows = tables.setdefault("/".join(metric) or "loss", {})
                    rows.setdefault(f"{evaluation.run} {step}", {})[column] = value
    for metric, rows in tables.items():
        table = Table(title=metric, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("run and step", no_wrap=True)
        columns = columns_of(rows)
        for column in columns:
            table.add_column(column, justify="right", overflow="fold")
        kind = "value" if metric == "loss" else metric
        for row, values in rows.items():
            cells = [format_value(kind, values[c]) if c in values else "" for c in columns]
            table.add_row(row, *cells)
        console.print(table)


def send_to_wandb(run_dir: RunDir, evaluation: Evaluation) -> None:
    """Add the evaluation to the run in W&B, as `evals/NAME/...` over a step of its own.

    What fails in that only warns: the results are on disk.
    """
    import wandb  # takes seconds, and not every run is tracked

    options = load_config(run_dir.config_file).track.wandb.model_dump()
    run_id, prefix = run_dir.path.name, f"evals/{evaluation.name}"
    settings = wandb.Settings(show_info=False, quiet=True, console="off", init_timeout=60)
    try:
        run = wandb.init(
            **options, id=run_id, name=run_id, resume="allow", dir=str(run_dir.path),
            settings=settings,
        )  # fmt: skip
        # W&B drops what is logged at a step before its last one.
        run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
        for step, values in evaluation.checkpoints.items():
            sent: dict[str, Any] = {f"{prefix}/step": step}
            sent |= {f"{prefix}/{k.removeprefix('eval/')}": v for k, v in values.items()}
            for png in sorted((run_dir.path / prefix / f"step_{step}").glob("*.png")):
                sent[f"{prefix}/{png.stem}"] = wandb.Image(str(png))
            run.log(sent)
        run.finish()
    except (wandb.Error, OSError) as error:
        print(f"W&B failed: {error}; the results are on disk all the same", file=sys.stderr)


def _evaluate_all(arguments: argparse.Namespace, dist: Dist, console: Console) -> int:
    if dist.is_main:
        find_runs(arguments.runs)  # a run of W&B is downloaded once, then found by all
    barrier(dist)
    runs = with_checkpoints(arguments.runs, console)
    evaluations = []
    for run_dir in runs:
        if arguments.all_steps:
            steps = checkpoint_steps(run_dir)
        else:
            steps = arguments.step or [newest_valid_checkpoint(run_dir)[1]]
        console.print(f"evaluating {run_dir.path.name} at step {', '.join(map(str, steps))}")
        evaluation = evaluate_run(
            run_dir, steps, arguments.batch_size, arguments.steps, arguments.name, dist
        )
        tracked = load_config(run_dir.config_file).track.wandb.mode != "disabled"
        if dist.is_main and tracked and arguments.wandb == "auto":
            send_to_wandb(run_dir, evaluation)
        evaluations.append(evaluation)
    print_tables(evaluations, console)
    for run_dir in runs:
        written = run_dir.path / "evals" / f"{arguments.name}.json"
        console.print(f"wrote {written}", soft_wrap=True, highlight=False)
    for reference in arguments.runs:
        console.print(
            f"next: python -m spd_analysis.report {shlex.quote(reference)}  (one page with all "
            "of it)", soft_wrap=True, highlight=False,
        )  # fmt: skip
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command.parser("spd_analysis.evaluate_run", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN|LAUNCH", help="folders or ids; or W&B runs")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--step", type=int, nargs="+", metavar="N", help="at these checkpoints; default: the last"
    )
    which.add_argument("--all-steps", action="store_true", help="at every checkpoint that is kept")
    parser.add_argument("--batch-size", type=_count, metavar="N", help="default: the config's")
    parser.add_argument(
        "--steps", type=_count, metavar="N", help="batches of data; default: the config's"
    )
    parser.add_argument(
        "--name", type=command.name, default="full", help="of the results; default: full"
    )
    parser.add_argument(
        "--processes", type=_count, default=1, metavar="N", help="on this machine; default: 1"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--wandb", choices=["auto", "off"], default="auto", help="auto: where the run is tracked"
    )
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1")
    return int(text)


def main() -> int:
    arguments = _parser().parse_args()
    try:
        if arguments.processes > int(os.environ.get("WORLD_SIZE", "1")):
            # What is wrong is said once, not by every process.
            with_checkpoints(arguments.runs, Console(quiet=True))
            return run_here(arguments.processes, "spd_analysis.evaluate_run", sys.argv[1:])
        with joined(arguments.device) as dist:
            return _evaluate_all(arguments, dist, Console(quiet=not dist.is_main))
    except (ValueError, OSError) as error:  # OSError: the store of data, say, cannot be reached
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
