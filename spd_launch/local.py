"""Runs on this machine: dp processes of what Slurm would start, `launch.pack` tasks at a time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Event, Lock

from spd_core.run_dir import RunDir
from spd_launch.ledger import LaunchDir, find_row, mark_failed, note_jobs, read_rows
from spd_launch.plan import Task, share
from spd_launch.run_record import read_error, read_status
from spd_launch.steps import STEPS
from spd_launch.task import STOPPED, rank_environment
from spd_launch.then import unmet


def run_here(launch: LaunchDir, tasks: Sequence[Task], python_path: Path) -> int:
    """Run the tasks; returns 0 if all finished, else the exit code of the first that did not.

    `launch.pack` runs are at work at one time; with more than one each has a log of its own, also
    where one is resumed alone. Ctrl-C saves, ends what runs and leaves the others for `resume`. A
    step whose runs have not finished is left too.
    """
    job_id = f"local-{os.getpid()}"
    note_jobs(launch, "local", {task.run_id: job_id for task in tasks})
    runs = [task for task in tasks if task.goal not in STEPS]
    asked = tasks[0].config.launch.pack
    pack = max(1, min(asked, len(runs)))
    started, starting, stopping = list[subprocess.Popen[bytes]](), Lock(), Event()
    rows = read_rows(launch)

    def run(task: Task) -> int:
        number = tasks.index(task)
        log = launch.logs / f"{job_id}_{number}_log.out" if asked > 1 else None
        name = f"[{number + 1}/{len(tasks)}] {task.run_id}"
        with starting:
            if stopping.is_set():
                return STOPPED
            if log is not None or len(tasks) > 1:
                print(name if log is None else f"{name}   {log}", flush=True)
            if task.goal in STEPS and (problem := unmet(launch, find_row(rows, task.run_id))):
                print(f"not started: {problem}", flush=True)
                return 1
            at_once = 1 if task.goal in STEPS else pack
            ranks = _start(launch, task, python_path, f"{job_id}-{task.index}", at_once, log)
            started.extend(ranks)
        code = _wait(ranks)
        if code == STOPPED:
            stopping.set()
        elif code == 128 + signal.SIGKILL and task.goal not in STEPS and not stopping.is_set():
            _say_that_it_was_killed(launch.run_dir(task.run_id))
        if log is not None and code != STOPPED:  # what it printed itself is in there
            print(
                f"{name} {_outcome(launch.folder(find_row(rows, task.run_id)), code)}", flush=True
            )
        return code

    with term_is_interrupt(), ThreadPoolExecutor(pack) as pool:
        try:
            codes = list(pool.map(run, runs))
            codes += [run(task) for task in tasks if task.goal in STEPS]
        except KeyboardInterrupt:
            with starting:
                stopping.set()
            return _interrupt(started)
    return STOPPED if STOPPED in codes else next(filter(None, codes), 0)


def rank_command(launch: LaunchDir, task: Task) -> list[str]:
    """What each rank of the task runs, here and on Slurm."""
    module = "spd_launch.then" if task.goal in STEPS else "spd_launch.task"
    return [sys.executable, "-m", module, str(launch.path), task.run_id]


def _start(
    launch: LaunchDir, task: Task, python_path: Path, job_id: str, pack: int, log: Path | None
) -> list[subprocess.Popen[bytes]]:
    """The ranks of a task, which has its part of the cores of `pack`; to the terminal, or a log."""
    dp, cluster = task.nodes * task.tasks_per_node, share(task.config.cluster, pack)
    with nullcontext() if log is None else open(log, "a") as output:
        return [
            subprocess.Popen(
                rank_command(launch, task),
                env={
                    **os.environ,
                    **rank_environment(cluster, python_path),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(dp),
                    "SPD_JOB_ID": job_id,
                    "SPD_LAUNCHER": str(os.getpid()),
                },
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
            )
            for rank in range(dp)
        ]


def _outcome(folder: RunDir, code: int) -> str:
    status = read_status(folder)
    if status is not None and status.state == "failed":
        return f"failed: {read_error(folder)}"
    return f"ended with code {code}" if code else "finished"


def _say_that_it_was_killed(run_dir: RunDir) -> None:
    """Who is killed has no time for it, and only this process sees it."""
    status = read_status(run_dir)
    if status is not None and status.state == "running":
        with suppress(OSError):
            reason = "by the kernel, if memory ran out (`dmesg` tells)"
            mark_failed(run_dir, RuntimeError(f"a process was killed by SIGKILL: {reason}"))


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; one that dies ends the others, which would wait for it for ever."""
    first = 0
    while None in [rank.poll() for rank in ranks]:  # polls each of them
        first = first or _bad_code(ranks)
        if first not in (0, STOPPED):
            _end(ranks, grace_s=5)
        time.sleep(0.05)
    return first or _bad_code(ranks)


def _bad_code(ranks: list[subprocess.Popen[bytes]]) -> int:
    """The code of a rank that did not finish, as a shell would say it; else 0."""
    return next((c if c > 0 else 128 - c for c in (r.returncode for r in ranks) if c), 0)


def _interrupt(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Let the ranks save; a second Ctrl-C does not wait for that."""
    print("\nstopping: saving a checkpoint (Ctrl-C again to stop at once)", flush=True)
    with suppress(KeyboardInterrupt):
        _end(ranks, grace_s=120)
    for rank in ranks:
        rank.kill()
        rank.wait()
    return STOPPED


def _end(ranks: list[subprocess.Popen[bytes]], grace_s: float) -> None:
    for rank in ranks:
        rank.terminate()
    deadline = time.monotonic() + grace_s
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()


@contextmanager
def term_is_interrupt() -> Iterator[None]:
    """Who is asked to end ends as by Ctrl-C: with what it has to do first."""
    old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
