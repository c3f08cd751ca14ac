"""Runs that share a job (`launch.pack`): who takes part, who requeues it, how one ends alone."""

import time
from typing import TYPE_CHECKING

from spd_core.run_dir import RunDir
from spd_launch.ledger import LaunchDir, jobs_of_runs
from spd_launch.run_record import read_status

if TYPE_CHECKING:
    from pathlib import Path

    from spd_launch.task import Place

CANCELLED = "cancelled"  # in the place of the owner: this run is to end, others of its job are not


def owner_file(run_dir: RunDir) -> "Path":
    return run_dir.path / ".owner"


def not_for_this_job(launch: LaunchDir, run_id: str, place: "Place") -> str | None:
    """Why a run that shares its job takes no part in this attempt of it, if so."""
    status = read_status(launch.run_dir(run_id))
    if status is not None and status.state in ("failed", "cancelled"):
        return f"{run_id} is {status.state}: only `resume` continues it"
    given = jobs_of_runs(launch).get(run_id, [])  # this job may start before it is noted
    if place.job_id in given[1:]:
        return f"{run_id} was resumed in another job"
    return None


def speaks_for_all(run_dir: RunDir, place: "Place", limit_s: float) -> bool:
    """Whether this run requeues the job that it shares: once all of them have saved, the first."""
    deadline, siblings = time.monotonic() + limit_s, run_dir.path.parent
    while time.monotonic() < deadline:
        statuses = {name: read_status(RunDir(siblings / name)) for name in place.beside}
        states = {
            name: status.state
            for name, status in statuses.items()
            # What was resumed in another job may be stopped there, and speaks for that one.
            if status is not None and status.job_id in (None, place.job_id)
        }
        if not {"running", "pending"} & set(states.values()):
            stopped = [name for name, state in states.items() if state == "stopped"]
            return min([run_dir.path.name, *stopped]) == run_dir.path.name
        time.sleep(0.5)
    return True  # what has not saved by now goes on from its last checkpoint
