"""What it takes to look at a launch.

    python -m benchmarks.status --runs N [--records N]

Makes the folders of a launch of N runs half of which finished, each with a step after it, and
prints one JSON line: of each command on it, and of `--help`, the seconds by the clock and of the
processor. It needs no Slurm, and then the commands say that there is none; where there is one, its
answer is part of the time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from spd_core.run_dir import append_metrics
from spd_launch.compose import PACKAGE_ROOT, compose
from spd_launch.config import JobConfig
from spd_launch.errors import exit_with
from spd_launch.freeze import record
from spd_launch.ledger import LaunchDir, new_launch, note_jobs, read_rows
from spd_launch.run_record import Status, write_status
from spd_launch.snapshot import Snapshot
from spd_launch.validate import validate

COMMANDS = {
    "help": ["status", "--help"],
    "launches": ["status"],
    "status": ["status", "latest"],
    "json": ["status", "latest", "--json"],
    "results": ["results", "latest", "--lowest", "loss/total"],
    "logs": ["logs", "latest"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, required=True)
    parser.add_argument("--records", type=int, default=200, help="lines of metrics.jsonl of a run")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="spd-bench-") as folder:
        make_launch(Path(folder), options.runs, options.records)
        times = {name: measure(Path(folder), command) for name, command in COMMANDS.items()}
    print(json.dumps({"runs": options.runs, "records": options.records, **times}))
    return 0


def make_launch(out_dir: Path, n_runs: int, n_records: int) -> LaunchDir:
    """A launch on Slurm, as its files look when half of its runs have finished."""
    arguments = [
        "+experiment=tms_5-2", "cluster=cpu", f"launch.out_dir='{out_dir}'",
        "launch.then=[evaluate,report]",
    ]  # fmt: skip
    values = compose(arguments, multirun=False)[0].values
    first = validate(values)
    runs: list[tuple[dict[str, str], JobConfig]] = [
        ({"seed": str(seed)}, first.model_copy(update={"seed": seed})) for seed in range(n_runs)
    ]
    plan, launch = new_launch(runs)
    record(launch, plan, Snapshot(PACKAGE_ROOT, None, None), [])
    note_jobs(launch, "submit", {row.name: f"7_{row.index}" for row in read_rows(launch)})
    for task in plan.tasks[:n_runs]:
        folder, steps = launch.run_dir(task.run_id), task.config.train.steps
        for i in range(n_records):
            values = {f"loss/{name}": 1.5 / (i + 1) for name in ("total", "stochastic_recon", "p")}
            values |= {f"eval/ci_l0_0.1/linear{j}": 1.0 for j in range(6)}
            append_metrics(folder, {"step": 10 * i, **values})
        state = "finished" if task.index % 2 else "failed"
        write_status(folder, Status(
            state=state, step=steps, steps=steps, heartbeat=time.time(), attempt=1,
            job_id=f"7_{task.index}", host="node1",
        ))  # fmt: skip
    return launch


def measure(out_dir: Path, command: list[str]) -> dict[str, float]:
    """Seconds of the best of three, and of the processor in that one."""
    module, *arguments = command
    line = [sys.executable, "-m", f"spd_launch.{module}", *arguments]
    env = {**os.environ, "SPD_OUT_DIR": str(out_dir)}
    times = []
    for _ in range(3):
        start, before = time.perf_counter(), os.times()
        subprocess.run(line, env=env, stdout=subprocess.DEVNULL, cwd=PACKAGE_ROOT, check=True)
        after = os.times()
        cpu = sum(after[2:4]) - sum(before[2:4])
        times.append((round(time.perf_counter() - start, 3), round(cpu, 3)))
    wall, cpu = min(times)
    return {"s": wall, "cpu_s": cpu}


if __name__ == "__main__":
    exit_with(main)
