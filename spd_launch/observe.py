"""The state of every row of a launch: squeue for what lives, its own file, then sacct."""

import argparse
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spd_launch import ledger, slurm_state
from spd_launch.ledger import LaunchDir
from spd_launch.run_record import Status, read_status
from spd_launch.slurm_state import LiveJob
from spd_launch.steps import STEPS, Row

DONE = ("finished", "failed", "cancelled")


@dataclass(frozen=True)
class Observed:
    """`live`: a process or a job works on it or waits to; `state` is for people."""

    row: Row
    state: str
    live: bool
    job_id: str
    where: str
    status: Status


def observe(launch: LaunchDir, rows: Sequence[Row]) -> list[Observed]:
    """`judge` what Slurm says now: at most one call of squeue and one of sacct.

    Raises:
        LaunchError: Slurm does not answer.
    """
    return judge(launch, rows, ask_slurm(launch))


def ask_slurm(launch: LaunchDir) -> dict[str, LiveJob]:
    """The jobs of the launch in the queue; none of one that runs here."""
    on_slurm = ledger.read_info(launch)["kind"] == "slurm"
    return slurm_state.live_jobs(launch.launch_id) if on_slurm else {}


def strangers(launch: LaunchDir, live: Mapping[str, LiveJob]) -> list[str]:
    """Jobs that carry the launch's name and stand in no file: it was killed as it sent them."""
    return sorted(set(live) - ledger.known_jobs(launch))


def judge(
    launch: LaunchDir, rows: Sequence[Row], live: Mapping[str, LiveJob] | None
) -> list[Observed]:
    """The state of each row, given the jobs in the queue; from the files alone if that is None.

    "no target", "no run": what it was to come after ended without success, so Slurm cancelled it.
    "not sent": the launch was interrupted before it.
    """
    info, given = ledger.read_info(launch), ledger.jobs_of_runs(launch)
    if live is None:
        return _from_files(launch, rows)
    on_slurm = info["kind"] == "slurm"
    statuses = {row.name: row_status(launch, row) for row in rows}

    def lives(job_id: str, status: Status) -> bool:
        if on_slurm:
            return job_id in live
        return status.state not in DONE and _lives_here(job_id, status)

    jobs = {name: its_jobs[0] for name, its_jobs in given.items()}
    for name in statuses.keys() & jobs:  # not the newest where two people resumed at once
        jobs[name] = next((j for j in given[name] if lives(j, statuses[name])), jobs[name])
    shared = {job for job, n_runs in Counter(jobs.values()).items() if n_runs > 1}
    lost = [
        jobs[row.name]
        for row in rows
        if on_slurm and row.name in jobs and jobs[row.name] not in live
        and statuses[row.name].state not in DONE
    ]  # fmt: skip
    ended = slurm_state.ended_jobs(lost)

    def given_up(row: Row) -> bool:
        """Whether it never started, and what it comes after is over without success."""
        before = [] if row.after is None else [row.after]
        if row.goal in STEPS and row.after is None and info["then_needs"] == "all":
            before = [other.name for other in rows if other.goal == "decomposition"]
        states = {name: statuses.get(name) or read_status(launch.run_dir(name)) for name in before}
        return statuses[row.name].state == "pending" and any(
            status is not None and status.state != "finished" and jobs.get(name) not in live
            for name, status in states.items()
        )

    found = []
    for row in rows:
        status, job_id = statuses[row.name], jobs.get(row.name, "")
        goes_on_for_others = job_id in shared and status.state in DONE
        job = None if goes_on_for_others else live.get(job_id)
        alive = job is not None if on_slurm else bool(job_id) and lives(job_id, status)
        where = status.host
        if job is not None:
            state, where = job.state.lower(), job.where
        elif alive or status.state in (*DONE, "stopped"):
            state = status.state
        elif not job_id:
            state = "not sent"
        elif given_up(row):
            state = "no run" if row.goal in STEPS else "no target"
        else:
            state = f"{ended.get(job_id, '').lower() or 'ended'}, not finished"
        found.append(Observed(row, state, alive, job_id, where, status))
    return found


def _from_files(launch: LaunchDir, rows: Sequence[Row]) -> list[Observed]:
    jobs, found = ledger.latest_jobs(launch), []
    for row in rows:
        status, job_id = row_status(launch, row), jobs.get(row.name, "")
        alive = bool(job_id) and status.state not in DONE
        found.append(Observed(row, status.state, alive, job_id, status.host, status))
    return found


def row_status(launch: LaunchDir, row: Row) -> Status:
    """A step has a status once it has started."""
    status = read_status(launch.folder(row))
    assert status is not None or row.goal in STEPS, f"no status of {row.name}"
    return status or ledger.pending(1)


def _lives_here(job_id: str, status: Status) -> bool:
    """Whether the launcher of a local run still is; on another machine only its heartbeat tells."""
    if status.host not in ("", socket.gethostname()):
        return time.time() - status.heartbeat < 120
    pid = job_id.split("-")[-1]
    if pid == str(os.getpid()):  # which a container gives to each first process
        return False
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


LAUNCH_HELP = (
    "a launch: its id, a unique part of that, its launch.name, or `latest`; or a run of one: its "
    "id, or its name in runs.yaml"
)


def parser(description: str, nargs: Literal["one", "?", "+", "*"]) -> argparse.ArgumentParser:
    """What the commands about launches have in common."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    match nargs:
        case "one":
            result.add_argument("launch", help=LAUNCH_HELP)
        case "?":
            result.add_argument("launch", nargs="?", help=LAUNCH_HELP)
        case "+" | "*":
            result.add_argument("launches", nargs=nargs, metavar="launch", help=LAUNCH_HELP)
    result.add_argument(
        "--out-dir",
        type=lambda text: Path(text).expanduser().absolute(),
        default=ledger.default_out_dir(),
        help="where the results are; default $SPD_OUT_DIR or ./outputs",
    )
    return result
