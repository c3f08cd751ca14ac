"""The state of every run of a launch: squeue for what lives, the run's own file, then sacct."""

import argparse
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spd_launch import ledger, slurm_state
from spd_launch.ledger import LaunchDir
from spd_launch.plan import Task
from spd_launch.run_record import Status, read_status

DONE = ("finished", "failed", "cancelled")


@dataclass(frozen=True)
class Observed:
    """`live`: a process or a job works on it or waits to; `state` is for people."""

    task: Task
    state: str
    live: bool
    job_id: str
    where: str
    status: Status


def observe(launch: LaunchDir, tasks: Sequence[Task]) -> list[Observed]:
    """At most one squeue and one sacct call for the whole launch.

    "no target": the job that was to train its target ended without one, so Slurm cancelled it.
    """
    jobs = ledger.latest_jobs(launch)
    on_slurm = ledger.read_info(launch)["kind"] == "slurm"
    live = slurm_state.live_jobs(launch.launch_id) if on_slurm else {}
    statuses = {task.run_id: read_status(launch.run_dir(task.run_id)) for task in tasks}
    lost = [
        jobs[run_id]
        for run_id, status in statuses.items()
        if on_slurm and run_id in jobs and jobs[run_id] not in live
        and status is not None and status.state not in DONE
    ]  # fmt: skip
    ended = slurm_state.ended_jobs(lost)
    rows = []
    for task in tasks:
        status = statuses[task.run_id]
        assert status is not None, f"no status of {task.run_id}"
        job_id = jobs.get(task.run_id, "")
        job = live.get(job_id)
        if job is not None:
            rows.append(Observed(task, job.state.lower(), True, job_id, job.where, status))
        elif status.state in DONE:
            rows.append(Observed(task, status.state, False, job_id, status.host, status))
        elif not on_slurm and _lives_here(job_id, status):
            rows.append(Observed(task, status.state, True, job_id, status.host, status))
        else:
            state = ended.get(job_id, "").lower() or "ended"
            state = status.state if status.state == "stopped" else f"{state}, not finished"
            if status.state == "pending" and task.after is not None:
                target = read_status(launch.run_dir(task.after))
                assert target is not None, f"no status of {task.after}"
                if target.state != "finished" and jobs.get(task.after) not in live:
                    state = "no target"
            rows.append(Observed(task, state, False, job_id, status.host, status))
    return rows


def _lives_here(job_id: str, status: Status) -> bool:
    """Whether the launcher of a local run still is; on another machine only its heartbeat tells."""
    if status.host not in ("", socket.gethostname()):
        return time.time() - status.heartbeat < 120
    pid = job_id.split("-")[-1]
    command = Path("/proc", pid, "cmdline")
    if command.exists():
        return b"spd_launch" in command.read_bytes()
    return Path("/proc").exists() is False and pid.isdigit() and _answers(int(pid))


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def parser(description: str, launch_required: bool = True) -> argparse.ArgumentParser:
    """What the commands about a launch have in common."""
    result = argparse.ArgumentParser(description=description)
    nargs = None if launch_required else "?"
    result.add_argument(
        "launch", nargs=nargs, help="a launch id, a unique part of one, or `latest`"
    )
    result.add_argument(
        "--out-dir",
        type=lambda text: Path(text).expanduser().absolute(),
        default=ledger.default_out_dir(),
        help="where the results are; default $SPD_OUT_DIR or ./outputs",
    )
    return result
