"""The step of several experiments: naive, eager, and as it runs, against the stored last result.

    python -m benchmarks.table [--steps N] [--threads N] [--only EXPERIMENT ...]

Each way is a process of its own, and they take turns of one step. `eager` is the core without its
compiled loops, `best` as it runs, and `bf16` that with train.autocast=bf16. Writes
benchmarks/results/step-N-threads.json, which the next call with as many threads compares with.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from benchmarks.naive import naive_step
from benchmarks.step import composed, with_random_target
from spd_core.distributed import Dist
from spd_core.step import optimisation_step
from spd_core.train import build_optimizer
from spd_launch.task import TUNING

How = Literal["naive", "eager", "best", "bf16"]
HOW: tuple[How, ...] = ("naive", "eager", "best", "bf16")
CASES = {
    "tms_5-2": [],
    "tms_40-10": [],
    "resid_mlp2": [],
    "ss_llama_simple": ["data=stories", "train.batch_size=4", "data.seq_len=256"],
}
RESULTS = Path(__file__).parent / "results"
N_WARMUP = 3
REGRESSION = 1.2  # of the ratio to naive; less is the noise of a shared machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    given = parser.parse_args()
    file = RESULTS / f"step-{given.threads}-threads.json"
    last = json.loads(file.read_text()) if file.exists() else {}
    results = {name: measure(name, given.steps, given.threads) for name in given.only}
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(last | results, indent=1) + "\n")
    Console(width=120).print(table(results, last))
    print(f"written to {file}; docs/performance.md says where the time goes")


def measure(experiment: str, steps: int, n_threads: int) -> dict[str, dict[str, float]]:
    """Median seconds and peak MiB of each way, which take turns."""
    os.environ.update(TUNING)  # read as a process starts
    context, lines = get_context("spawn"), {}
    for how in HOW:
        ours, theirs = context.Pipe()
        context.Process(
            target=serve, args=(theirs, experiment, how, n_threads), daemon=True
        ).start()
        lines[how] = ours
    seconds: dict[str, list[float]] = {how: [] for how in HOW}
    for _ in track(range(N_WARMUP + steps), experiment):
        for how, line in lines.items():
            line.send("step")
            seconds[how].append(line.recv())
    found = {}
    for how, line in lines.items():
        line.send("end")
        median = statistics.median(seconds[how][N_WARMUP:])
        found[how] = {"s": round(median, 5), "peak_mib": round(line.recv())}
    return found


def serve(line: Connection, experiment: str, how: How, n_threads: int) -> None:
    """Take a step each time it is asked to and say its seconds; at the end, the peak memory."""
    if how == "eager":
        os.environ["CC"] = "none"
    torch.set_num_threads(n_threads)
    one_step, step = make_step(experiment, how), 0
    while line.recv() == "step":
        started = time.perf_counter()
        one_step(step)
        line.send(time.perf_counter() - started)
        step += 1
    line.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def make_step(experiment: str, how: How) -> Callable[[int], object]:
    precision = ["train.autocast=bf16"] if how == "bf16" else []
    config, data = composed(experiment, [*CASES[experiment], *precision])
    d = with_random_target(config, data, Dist(0, 1, torch.device("cpu")))
    if how == "naive":
        naive = torch.optim.AdamW(d.model.parameters(), weight_decay=0.0)
        return lambda step: naive_step(config, d.model, data, naive, step)
    optimizer = build_optimizer(config, d.model)
    return lambda step: optimisation_step(d, optimizer, step, step, lambda _batch: {})


def table(results: dict[str, dict], last: dict[str, dict]) -> Table:
    """Seconds and MiB of each way, the ratio to naive, and what it was."""
    headers = ["experiment", *HOW, "ratio", "last"]
    columns = (Column(header, no_wrap=True) for header in headers)
    title = "seconds a step (peak MiB); ratio of naive to best, now and last time"
    shown = Table(*columns, title=title, title_justify="left")
    for name, ways in results.items():
        cells = [f"{ways[how]['s']:.4f} ({ways[how]['peak_mib']:.0f})" for how in HOW]
        ratio, before = ratio_of(ways), ratio_of(last[name]) if name in last else None
        worse = before is not None and before > REGRESSION * ratio
        mark = "[bold red]" if worse else "[green]"
        shown.add_row(name, *cells, f"{mark}{ratio:.2f}", f"{before:.2f}" if before else "-")
    return shown


def ratio_of(ways: dict[str, dict[str, float]]) -> float:
    return ways["naive"]["s"] / ways["best"]["s"]


if __name__ == "__main__":
    main()
