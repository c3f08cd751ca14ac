"""What one rank does, on a node or here: environment, meeting, signals, then the training core.

    python -m spd_launch.task LAUNCH_DIR RUN_ID     one local rank (RANK, WORLD_SIZE, LOCAL_RANK)

On Slurm, submitit calls `run` in each task of a job, or `run_one_of` where several runs share it
(`launch.pack`). Signals:
USR2 (the time limit is near)      save together, then rank 0 requeues the job.
TERM (preemption, or scancel)      save together, then WAIT to be killed: who exits in the grace
                                   period counts as completed and is never requeued by Slurm, and
                                   a cancelled job must not requeue itself.
Locally, INT and TERM save and exit with 130.
A job that crashes is requeued as well, if it got further than at its last crash. Runs that share a
job fail apart, and are requeued together: what failed stays failed until `resume`.
A toy target cannot be saved on its way: it goes on, and starts anew where it is killed.
"""

import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, TextIO

from rich.console import Console

from spd_core.run_dir import RunDir, write_atomic
from spd_launch import slurm_state
from spd_launch.config import ClusterConfig, JobConfig
from spd_launch.errors import LaunchError, exit_with
from spd_launch.ledger import LaunchDir, mark, mark_failed, n_steps, read_info, read_task
from spd_launch.pack import CANCELLED, not_for_this_job, owner_file, speaks_for_all
from spd_launch.ports import Meeting, await_meeting, free_port, publish
from spd_launch.preflight import check_code, check_node, drop_half_result, load_torch
from spd_launch.progress import Heartbeat, StepBar
from spd_launch.run_record import (
    n_time_limits,
    note_crash,
    note_time_limit,
    read_status,
    write_environment,
)
from spd_launch.upload import uploading

if TYPE_CHECKING:
    from spd_core.distributed import Dist

STOPPED = 130  # exit code of a local run that was asked to stop
OWNER_S, TAKEOVER_S = 5.0, 120.0  # how often an attempt looks whether it is the last, and may take
# Else freed memory goes to the kernel, which zeroes each page of the next tensor (half of a toy
# step), and a thread that waits spins on a core of a busy machine (a step takes ten times longer).
TUNING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "GOMP_SPINCOUNT": "10000"}


def rank_environment(cluster: ClusterConfig, python_path: Path) -> dict[str, str]:
    """The environment of every rank, here and on a cluster; the profile has the last word."""
    inherited = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": f"{python_path}:{inherited}" if inherited else str(python_path),
        "PYTHONSAFEPATH": "1",  # else the current directory comes before the snapshot
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # where native code crashes, every thread's Python stack
        "SPD_CODE": str(python_path),
        "OMP_NUM_THREADS": str(cluster.cpus_per_task),
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        **TUNING,
        **cluster.env,
    }


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank, and which attempt of which job it belongs to.

    `beside` are the other runs of the job, each with a process of its own.
    """

    rank: int
    world_size: int
    local_rank: int
    nodes: int
    job_id: str
    restart: int
    beside: tuple[str, ...] = ()


def place_from_environment(kind: str) -> Place:
    env = os.environ
    if kind == "local":
        job = env.get("SPD_JOB_ID", f"local-{os.getpid()}")
        rank, size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
        return Place(rank, size, int(env.get("LOCAL_RANK", "0")), nodes=1, job_id=job, restart=0)
    array = env.get("SLURM_ARRAY_JOB_ID")
    return Place(
        rank=int(env["SLURM_PROCID"]),
        world_size=int(env["SLURM_NTASKS"]),
        local_rank=int(env["SLURM_LOCALID"]),
        nodes=int(env["SLURM_JOB_NUM_NODES"]),
        job_id=f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"],
        restart=int(env.get("SLURM_RESTART_COUNT", "0")),
    )


class Stop:
    """Set by signals, asked by the training loop; a handler does nothing else."""

    def __init__(self) -> None:
        self.signal: int | None = None
        # Replaces submitit's handlers, which requeue from inside the handler.
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, number: int, _frame: object) -> None:
        if self.signal != signal.SIGTERM:  # TERM outranks: the job must not requeue itself
            self.signal = number

    def __call__(self) -> bool:
        return self.signal is not None


def run(launch_dir: str, run_id: str) -> None:
    """Train what this run of the launch asks for, from its newest checkpoint if it has one.

    An exception marks the run failed and leaves the process with a non-zero code.
    """
    stop, launch = Stop(), LaunchDir(Path(launch_dir))
    _run(launch, run_id, place_from_environment(read_info(launch)["kind"]), stop)


def run_one_of(launch_dir: str, run_ids: Sequence[str]) -> None:
    """`run` one of the runs that share a job; srun's number of this process says which."""
    stop, launch, place = Stop(), LaunchDir(Path(launch_dir)), place_from_environment("slurm")
    if place.rank >= len(run_ids):
        return  # the last job of an array may have fewer runs than the others
    run_id = run_ids[place.rank]
    beside = tuple(other for other in run_ids if other != run_id)
    _run(launch, run_id, replace(place, rank=0, world_size=1, beside=beside), stop)


def _run(launch: LaunchDir, run_id: str, place: Place, stop: Stop) -> None:
    os.umask(0o002)
    check_code()
    drop_half_result()
    os.environ["SPD_LAUNCH"] = str(launch.path)  # for the upload, a process of its own
    run_dir, config = launch.run_dir(run_id), read_task(launch, run_id).config
    _end_with_launcher(config.cluster)
    if place.beside and (problem := not_for_this_job(launch, run_id, place)):
        print(problem, flush=True)
        sys.exit(1)
    lock = _lock(run_dir, place) if place.rank == 0 else None
    if place.beside and (problem := not_for_this_job(launch, run_id, place)):
        print(problem, flush=True)  # cancelled since, before there was an owner to tell
        sys.exit(1)
    status = read_status(run_dir)
    if status is not None and status.state == "finished":
        print(f"{run_dir.path.name} is finished already")
        reported = config.launch.goal == "target" or run_dir.report_file.exists()
        if place.rank == 0 and not reported:  # killed before it was written
            _report(run_dir)
        return
    try:
        outcome = _train(config, run_dir, place, stop, read_info(launch)["commit"])
    except Exception as error:
        from spd_launch.peers import PeerFailed  # torch is loaded by now

        # Who was stopped by another rank leaves the word to that one and to rank 0, who knows more.
        if place.rank == 0 or not isinstance(error, PeerFailed):
            with suppress(OSError):  # a folder gone read-only must not hide what was before
                mark_failed(run_dir, error)
        if place.rank == 0 and _may_crash_again(config, run_dir, place, error):
            slurm_state.requeue(os.environ["SLURM_JOB_ID"])
        raise
    if outcome == "stopped":
        _leave(config, run_dir, place, stop)
    if lock is not None:
        lock.close()


def _lock(run_dir: RunDir, place: Place) -> TextIO:
    """Two processes in one run's folder would delete each other's checkpoints.

    The lock lasts as long as the process, however that ends. On a node that Slurm has lost it may
    go on when its job runs elsewhere: `.owner` tells it to end, and the new attempt waits for that.
    """
    file, owner = open(run_dir.path / ".lock", "w"), owner_file(run_dir)  # noqa: SIM115
    own, deadline = f"{place.job_id} {place.restart}", time.monotonic() + TAKEOVER_S
    while not _acquired(file):
        same_job = owner.exists() and owner.read_text().split()[0] == place.job_id
        if not (same_job and place.restart) or time.monotonic() > deadline:
            raise LaunchError(
                f"{run_dir.path.name} is being worked on by another process; "
                "python -m spd_launch.status shows which, .cancel ends it"
            )
        write_atomic(owner, own)
        time.sleep(1)
    write_atomic(owner, own)
    threading.Thread(target=_end_when_superseded, args=(owner, own), daemon=True).start()
    return file


def _end_when_superseded(owner: Path, own: str) -> None:
    while True:
        time.sleep(OWNER_S)
        with suppress(OSError):  # the folder was removed; or NFS, that the file was replaced
            now = owner.read_text()
            if now == CANCELLED:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            if now != own:
                print("this job was started again elsewhere: this attempt ends", flush=True)
                os._exit(1)


def _acquired(file: TextIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _end_with_launcher(cluster: ClusterConfig) -> None:
    """A local rank whose launcher was killed must not go on: nobody could see or cancel it."""
    if cluster.kind != "local" or "SPD_LAUNCHER" not in os.environ:
        return
    launcher = int(os.environ["SPD_LAUNCHER"])

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _train(config: JobConfig, run_dir: RunDir, place: Place, stop: Stop, commit: str | None) -> str:
    load_torch()
    from spd_core import distributed
    from spd_launch.peers import watching

    meeting = _meet(run_dir, place)
    dist = distributed.init(
        place.rank, place.world_size, place.local_rank,
        f"{meeting.address}:{meeting.port}", _device(config, place),
    )  # fmt: skip
    if dist.is_main:
        write_environment(run_dir, commit)
    written = run_dir if dist.is_main else None
    heartbeat = Heartbeat(written, n_steps(config), meeting.attempt, place.job_id)
    heartbeat.write("running")
    train = {"decomposition": _decompose, "target": _train_target}[config.launch.goal]
    with watching(dist, meeting.address, lambda: mark(run_dir, "failed")):
        try:
            check_node(run_dir, dist)
            outcome = train(config, run_dir, dist, heartbeat, stop)
        except BaseException:
            with suppress(OSError):
                heartbeat.write("failed")
            raise
        distributed.barrier(dist)  # srun --wait ends a job a minute after its first rank left
    if outcome == "finished":
        distributed.shutdown()
    return outcome


def _decompose(
    config: JobConfig, run_dir: RunDir, dist: "Dist", heartbeat: Heartbeat, stop: Stop
) -> Literal["finished", "stopped"]:
    from spd_core.train import train

    shown = StepBar(config.train.steps, Console(quiet=not dist.is_main))

    def after_step(step: int, values: dict[str, float]) -> bool:
        heartbeat.at(step)
        shown.at(step, values)
        return stop()

    with uploading(config, run_dir) if dist.is_main else nullcontext():
        try:
            outcome = train(config, run_dir, dist, after_step)
        finally:
            shown.bar.stop()
        heartbeat.write(outcome)
    if outcome == "finished" and dist.is_main:
        _report(run_dir)
    return outcome


def _train_target(
    config: JobConfig, run_dir: RunDir, dist: "Dist", heartbeat: Heartbeat, stop: Stop
) -> Literal["finished", "stopped"]:
    from spd_core.targets.train_target import target_folder, train_target

    def after_step(step: int) -> bool:
        heartbeat.at(step)
        return stop()

    console = Console(quiet=not dist.is_main)
    outcome = train_target(config, run_dir.targets, dist, console, after_step)
    if outcome == "finished":
        heartbeat.at(n_steps(config))
        console.print(f"the target is in {target_folder(config, run_dir.targets)}", soft_wrap=True)
    heartbeat.write(outcome)
    return outcome


def _device(config: JobConfig, place: Place) -> Literal["auto", "cpu", "cuda"]:
    """What `auto` means here: on Slurm what the profile asks for; locally a GPU for each rank."""
    if config.train.device != "auto":
        return config.train.device
    if config.cluster.kind == "slurm":
        return "cuda" if config.cluster.device == "gpu" else "cpu"
    import torch

    return "cuda" if torch.cuda.device_count() >= place.world_size else "cpu"


def _meet(run_dir: RunDir, place: Place) -> Meeting:
    file = run_dir.path / f"meeting-{place.job_id}-{place.restart}.json"
    if place.rank:
        return await_meeting(file)
    status = read_status(run_dir)
    address = (
        "127.0.0.1" if place.nodes == 1 else os.environ.get("SLURMD_NODENAME", socket.gethostname())
    )
    port = free_port(run_dir.path.name, place.restart)
    meeting = Meeting(address, port, 1 + (status.attempt if status else 0))
    if place.world_size > 1:
        publish(file, meeting)
    return meeting


def _report(run_dir: RunDir) -> None:
    from spd_analysis.report import write_report
    from spd_analysis.summary import print_summary

    write_report(run_dir)
    print_summary(run_dir)


def _leave(config: JobConfig, run_dir: RunDir, place: Place, stop: Stop) -> NoReturn:
    """After a save: wait for Slurm's kill, having asked for another turn if time ran out."""
    if config.cluster.kind == "local":
        sys.exit(STOPPED)
    _wait_for_reason(stop)
    if place.beside and owner_file(run_dir).read_text() == CANCELLED:
        mark(run_dir, "cancelled")
        sys.exit(128 + signal.SIGTERM)
    if stop.signal == signal.SIGUSR2 and place.rank == 0:
        n_limits = n_time_limits(run_dir, place.job_id)
        if config.cluster.requeue == "off" or n_limits >= config.launch.max_requeues:
            print(f"time limit reached after {n_limits} requeues; not requeued again")
            sys.exit(1)
        print(f"saved; to be requeued, {n_limits + 1} of {config.launch.max_requeues}", flush=True)
        note_time_limit(run_dir, place.job_id)
        speaks = speaks_for_all(run_dir, place, config.cluster.signal_delay_s / 2)
        if speaks and not slurm_state.requeue(os.environ["SLURM_JOB_ID"]):
            sys.exit(1)
    time.sleep(3600)
    sys.exit(128 + signal.SIGTERM)


def _may_crash_again(config: JobConfig, run_dir: RunDir, place: Place, error: Exception) -> bool:
    """Whether this crash is worth another turn: it is not what the same config does each time."""
    if config.cluster.kind == "local" or config.cluster.requeue == "off" or place.beside:
        return False
    if isinstance(error, ValueError | FloatingPointError):
        return False
    with suppress(OSError):
        return note_crash(run_dir, place.job_id, error)
    return False


def _wait_for_reason(stop: Stop) -> None:
    """All ranks stop together, but this one's own signal may be a moment late."""
    deadline = time.monotonic() + 60
    while not stop() and time.monotonic() < deadline:
        time.sleep(0.1)


def main() -> int:
    if len(sys.argv) != 3:
        raise LaunchError("usage: python -m spd_launch.task LAUNCH_DIR RUN_ID")
    try:
        run(sys.argv[1], sys.argv[2])
    except ValueError as error:  # the core's word for what a user asked wrongly
        if os.environ.get("SPD_TRACEBACK") == "1":
            raise
        raise LaunchError(f"{error}  (SPD_TRACEBACK=1 shows where)") from None
    return 0


if __name__ == "__main__":
    exit_with(main)
