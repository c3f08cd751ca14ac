"""Launches as their files look, written by the functions that a real one uses."""

import time
from pathlib import Path

from launch_configs import config

from spd_core.run_dir import append_metrics
from spd_launch.freeze import record
from spd_launch.ledger import LaunchDir, new_launch, read_task_rows
from spd_launch.run_record import State, Status, write_status
from spd_launch.snapshot import Snapshot


def launched(
    out_dir: Path, *states: State, cluster: str = "local", done: list[str] | None = None, **fields
) -> LaunchDir:
    """A launch of one run per state, of seed 0, 1, ...; its code is a folder with one file."""
    runs = [
        ({"seed": str(seed)}, config(cluster, seed=seed, launch__out_dir=str(out_dir), **fields))
        for seed in range(len(states))
    ]
    plan, launch = new_launch(runs)
    launch.code.mkdir()
    (launch.code / "code.py").write_text("x = 1\n" * 1000)
    record(launch, plan, Snapshot(launch.code, "abc", None), done or [])
    for row, state in zip(read_task_rows(launch), states, strict=False):
        set_state(launch, row.name, state)
    return launch


def set_state(
    launch: LaunchDir, name: str, state: State, step: int = 2, job_id: str | None = None
) -> None:
    write_status(launch.run_dir(name), Status(
        state=state, step=step, steps=4, heartbeat=time.time(), attempt=0 if state == "pending"
        else 1, job_id=job_id, host="",
    ))  # fmt: skip


def add_metrics(launch: LaunchDir, name: str, **values: float) -> None:
    """One line; `__` in a name stands for `/`."""
    metrics = {key.replace("__", "/"): value for key, value in values.items()}
    append_metrics(launch.run_dir(name), metrics)
