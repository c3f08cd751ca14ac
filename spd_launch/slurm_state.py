"""Questions to Slurm, ONE call for a whole launch: squeue for what lives, sacct for what ended.

Jobs carry the launch id as their name, which finds them also when a reply of sbatch was lost.
"""

import os
import re
import subprocess
import time
from dataclasses import dataclass

from spd_launch.errors import LaunchError


@dataclass(frozen=True)
class LiveJob:
    state: str  # Slurm's word, such as RUNNING or PENDING; any job that squeue shows lives
    where: str  # the nodes, or why it waits


def live_jobs(launch_id: str) -> dict[str, LiveJob]:
    """Job id (12 or 12_3) -> its state, for every job of the launch that is not over.

    Also of several launches, their ids separated by commas.
    """
    jobs = {}
    ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
    for line in _slurm("squeue", "-h", "-r", f"--name={launch_id}", "-o", "%i|%T|%R").splitlines():
        job_id, state, where = line.split("|", 2)
        if state not in ended:
            jobs[job_id] = LiveJob(state, where)
    return jobs


def ended_jobs(job_ids: list[str]) -> dict[str, str]:
    """Job id -> the state that accounting keeps; empty where there is no accounting."""
    if not job_ids:
        return {}
    base = ",".join(sorted({job_id.split("_")[0] for job_id in job_ids}))
    try:
        lines = _slurm("sacct", "-n", "-P", "-X", "-o", "JobID,State", "-j", base).splitlines()
    except LaunchError:
        return {}
    answers = [line.split("|", 1) for line in lines]
    return {one: state for job_id, state in answers for one in array_tasks(job_id)}


def array_tasks(job_id: str) -> list[str]:
    """The tasks that Slurm sums up in one line: 7_[1-3,9%2] is 7_1, 7_2, 7_3 and 7_9."""
    array, summed_up, tasks = job_id.partition("_[")
    if not summed_up:
        return [job_id]
    found: list[str] = []
    for first, last, step in re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", re.split("[]%]", tasks)[0]):
        numbers = range(int(first), int(last or first) + 1, int(step or 1))
        found += [f"{array}_{n}" for n in numbers]
    return found


def cancel_jobs(job_ids: list[str]) -> None:
    """Pending ones first, so that none starts in the place of one that is being killed.

    Not by `scancel --state=PENDING 7_1`, which cancels all of array 7 that is pending.
    """
    if job_ids:
        mine = ("squeue", "-h", "-r", f"--user={os.getuid()}", "--states=PENDING", "-o", "%i")
        waiting = set(_slurm(*mine).split())
        if first := [job for job in job_ids if job in waiting]:
            _slurm("scancel", *first)
        if rest := [job for job in job_ids if job not in waiting]:
            _slurm("scancel", *rest)


def requeue(job_id: str, wait_s: float = 5) -> bool:
    """Give this job another turn; its controller, while it is down, is asked again and again.

    False where it does not run any more, because it is being cancelled, or where Slurm refuses.
    """
    while True:
        try:
            state = _slurm("squeue", "-h", "-j", job_id, "-o", "%T").strip()
            if state == "RUNNING":
                _slurm("scontrol", "requeue", job_id)
                return True
            print(f"this job is {state.lower()}: not requeued", flush=True)
            return False
        except (LaunchError, subprocess.TimeoutExpired) as error:
            print(error, flush=True)
            refused = isinstance(error, LaunchError) and "slurm controller" not in str(error)
            if refused:
                return False
        time.sleep(wait_s)


def change_comment(job_id: str, old: str, new: str) -> None:
    """Give a job a comment in place of the old one; what somebody else wrote there stays.

    Of an array it takes ARRAY_TASK: by the plain number the first task would stand for all.
    """
    if _slurm("squeue", "-h", "-j", job_id, "-o", "%k").strip() == old:
        _slurm("scontrol", "update", f"jobid={job_id}", f"comment={new}")


def array_limit() -> int:
    """The most tasks of one array on this cluster."""
    config = _slurm("scontrol", "show", "config")
    limits = re.findall(r"^MaxArraySize\s*=\s*(\d+)|max_array_tasks=(\d+)", config, re.MULTILINE)
    return max(1, min(int(a or b) for a, b in limits))


def partitions() -> list[str]:
    return sorted(set(_slurm("sinfo", "-h", "-o", "%R").split()))


def _slurm(*command: str) -> str:
    try:
        # Else a long list of an array's tasks is cut short, where Slurm sums them up.
        env = {**os.environ, "SLURM_BITSTR_LEN": "0"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise LaunchError(
            f"{command[0]} is not on the PATH, so this machine is not a Slurm cluster's; "
            "cluster=local runs here"
        ) from None
    if done.returncode:
        raise LaunchError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
