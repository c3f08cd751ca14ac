"""Runs an hour of a sweep on this machine, for several numbers of runs at one time (`launch.pack`).

    python -m benchmarks.pack [--experiment tms_5-2] [--runs N] [--steps N] [--pack 1 2]

The target is trained first, and not timed. Then seeds 0 to N - 1 are launched as a user would, for
a few steps, with evaluation and figures at the end. What a step takes stands in metrics.jsonl; the
rest of the time is what a run costs beside its steps. With the experiment's own number of steps,
and its evaluations on the way left out, that gives runs an hour. Writes
benchmarks/results/pack.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Column, Table

from benchmarks.table import RESULTS
from spd_core.run_dir import read_metrics
from spd_launch.compose import compose
from spd_launch.ledger import find_launch, read_rows
from spd_launch.validate import validate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", default="tms_5-2")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pack", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    if bad := [pack for pack in given.pack if given.runs % pack]:
        parser.error(f"--runs {given.runs} leaves some of --pack {bad[0]} without work in the end")
    words = [f"+experiment={given.experiment}", "cluster=local"]
    train = validate(compose(words, multirun=False)[0].values).train
    results = {}
    with TemporaryDirectory(prefix="spd-bench-") as folder:
        out = Path(folder)
        launch([*words, "launch.goal=target"], out)
        for pack in given.pack:
            wall_s = launch(sweep(words, given.runs, given.steps, pack), out)
            step_s = train.batch_size / statistics.median(examples_per_s(out))
            results[str(pack)] = runs_an_hour(
                wall_s, step_s, given.runs // pack, pack, given.steps, train.steps
            )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "pack.json"
    last = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(last | {given.experiment: results}, indent=1) + "\n")
    Console().print(table(given.experiment, train.steps, results))
    print(f"written to {file}; to run a sweep so: launch.pack=K (docs/sweeps.md)")


def sweep(words: list[str], n_runs: int, steps: int, pack: int) -> list[str]:
    once = [f"eval.every={steps}", f"eval.slow_every={steps}", "launch.if_done=rerun"]
    return ["-m", *words, f"seed=range(0,{n_runs})", f"train.steps={steps}",
            f"launch.pack={pack}", *once]  # fmt: skip


def launch(arguments: list[str], out: Path) -> float:
    """Seconds that a launch takes.

    Raises:
        RuntimeError: it failed; what it said last.
    """
    command = [sys.executable, "-m", "spd_launch", *arguments, "launch.snapshot=off"]
    started = time.perf_counter()
    done = subprocess.run(
        command, env={**os.environ, "SPD_OUT_DIR": str(out)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]}")
    return time.perf_counter() - started


def examples_per_s(out: Path) -> list[float]:
    """Of all runs of the last launch, without what comes before their first line."""
    newest = find_launch("latest", out)
    runs = [newest.run_dir(row.name) for row in read_rows(newest)]
    lines = [line for run in runs for line in read_metrics(run)]
    return [float(line["examples_per_s"]) for line in lines if int(line["step"]) > 1]


def runs_an_hour(
    wall_s: float, step_s: float, n_rounds: int, pack: int, steps: int, own_steps: int
) -> dict[str, float]:
    """From the seconds of so many rounds of `pack` runs at one time, each of `steps` steps."""
    beside_s = wall_s / n_rounds - steps * step_s
    return {
        "wall_s": wall_s, "n_rounds": n_rounds, "steps": steps, "step_s": step_s,
        "beside_steps_s": beside_s,
        "runs_per_hour": 3600 * pack / (beside_s + own_steps * step_s),
    }  # fmt: skip


def table(experiment: str, own_steps: int, results: dict[str, dict[str, float]]) -> Table:
    headers = ["launch.pack", "ms a step", "s beside steps", "runs an hour", "ratio"]
    title = f"{experiment}, {own_steps:,} steps a run, extrapolated"
    shown = Table(*(Column(h, no_wrap=True) for h in headers), title=title, title_justify="left")
    first = next(iter(results.values()))["runs_per_hour"]
    for pack, found in results.items():
        rate = found["runs_per_hour"]
        shown.add_row(
            pack, f"{1e3 * found['step_s']:.2f}", f"{found['beside_steps_s']:.1f}",
            f"{rate:.1f}", f"{rate / first:.2f}",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    main()
