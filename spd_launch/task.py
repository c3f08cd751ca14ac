"""What one rank does, on a node or here: environment, meeting, signals, then the training core.

    python -m spd_launch.task LAUNCH_DIR RUN_ID     one local rank (RANK, WORLD_SIZE, LOCAL_RANK)

On Slurm, submitit calls `run` in each task of a job. Signals:
USR2 (the time limit is near)      save together, then rank 0 requeues the job.
TERM (preemption, or scancel)      save together, then WAIT to be killed: who exits in the grace
                                   period counts as completed and is never requeued by Slurm, and
                                   a cancelled job must not requeue itself.
Locally, INT and TERM save and exit with 130.
A toy target cannot be saved on its way: it goes on, and starts anew where it is killed.
"""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, TextIO

from spd_core.run_dir import RunDir
from spd_launch.config import ClusterConfig, JobConfig
from spd_launch.errors import LaunchError, exit_with
from spd_launch.ledger import LaunchDir, mark, mark_failed, n_steps, read_task
from spd_launch.ports import Meeting, await_meeting, free_port, publish
from spd_launch.run_record import Progress, read_status, write_environment
from spd_launch.upload import uploading

if TYPE_CHECKING:
    from spd_core.distributed import Dist

STOPPED = 130  # exit code of a local run that was asked to stop
# Else glibc gives the memory of every large tensor back to the kernel, which fills each page of the
# next one with zeros: half the time of a toy model's step.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
AfterStep = Callable[[int], bool]


def rank_environment(cluster: ClusterConfig, python_path: Path) -> dict[str, str]:
    """The environment of every rank, here and on a cluster; the profile has the last word."""
    inherited = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": f"{python_path}:{inherited}" if inherited else str(python_path),
        "PYTHONSAFEPATH": "1",  # else the current directory comes before the snapshot
        "PYTHONUNBUFFERED": "1",
        "SPD_CODE": str(python_path),
        "OMP_NUM_THREADS": str(cluster.cpus_per_task),
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        **MALLOC,
        **cluster.env,
    }


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank, and which attempt of which job it belongs to."""

    rank: int
    world_size: int
    local_rank: int
    nodes: int
    job_id: str
    restart: int


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
    stop = Stop()
    os.umask(0o002)
    check_code()
    launch = LaunchDir(Path(launch_dir))
    run_dir, config = launch.run_dir(run_id), read_task(launch, run_id).config
    place = place_from_environment(config.cluster.kind)
    _end_with_launcher(config.cluster)
    lock = _lock(run_dir) if place.rank == 0 else None
    status = read_status(run_dir)
    if status is not None and status.state == "finished":
        print(f"{run_dir.path.name} is finished already")
        reported = config.launch.goal == "target" or run_dir.report_file.exists()
        if place.rank == 0 and not reported:  # killed before it was written
            _report(run_dir)
        return
    try:
        outcome = _train(config, run_dir, place, stop)
    except Exception as error:
        from spd_launch.peers import PeerFailed  # torch is loaded by now

        # Who was stopped by another rank leaves the word to that one and to rank 0, who knows more.
        if place.rank == 0 or not isinstance(error, PeerFailed):
            mark_failed(run_dir, error)
        raise
    if outcome == "stopped":
        _leave(config, place, stop)
    if lock is not None:
        lock.close()


def _lock(run_dir: RunDir) -> TextIO:
    """Two processes in one run's folder would delete each other's checkpoints.

    The lock lasts as long as the process, however that ends.
    """
    file = open(run_dir.path / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LaunchError(
            f"{run_dir.path.name} is being worked on by another process; "
            "python -m spd_launch.status shows which, .cancel ends it"
        ) from None
    return file


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


def _train(config: JobConfig, run_dir: RunDir, place: Place, stop: Stop) -> str:
    from spd_core import distributed
    from spd_launch.peers import watching

    meeting = _meet(run_dir, place)
    dist = distributed.init(
        place.rank, place.world_size, place.local_rank,
        meeting.address, meeting.port, _device(config, place),
    )  # fmt: skip
    if dist.is_main:
        write_environment(run_dir)
    written = run_dir if dist.is_main else None
    progress = Progress(written, n_steps(config), meeting.attempt, place.job_id)
    progress.write("running")

    def after_step(step: int) -> bool:
        progress.at(step)
        return stop()

    train = {"decomposition": _decompose, "target": _train_target}[config.launch.goal]
    with watching(dist, meeting.address, lambda: mark(run_dir, "failed")):
        try:
            outcome = train(config, run_dir, dist, progress, after_step)
        except BaseException:
            progress.write("failed")
            raise
        distributed.barrier(dist)  # srun --wait ends a job a minute after its first rank left
    if outcome == "finished":
        distributed.shutdown()
    return outcome


def _decompose(
    config: JobConfig, run_dir: RunDir, dist: "Dist", progress: Progress, after_step: AfterStep
) -> Literal["finished", "stopped"]:
    from spd_core.train import train

    with uploading(config, run_dir) if dist.is_main else nullcontext():
        outcome = train(config, run_dir, dist, after_step)
        progress.write(outcome)
    if outcome == "finished" and dist.is_main:
        _report(run_dir)
    return outcome


def _train_target(
    config: JobConfig, run_dir: RunDir, dist: "Dist", progress: Progress, after_step: AfterStep
) -> Literal["finished", "stopped"]:
    from rich.console import Console

    from spd_core.targets.train_target import target_folder, train_target

    console = Console(quiet=not dist.is_main)
    outcome = train_target(config, run_dir.targets, dist, console, after_step)
    if outcome == "finished":
        progress.at(n_steps(config))
        console.print(f"the target is in {target_folder(config, run_dir.targets)}", soft_wrap=True)
    progress.write(outcome)
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


def check_code() -> None:
    """The imported packages are the snapshot's, not what lies in another place of sys.path."""
    import spd_core

    code = Path(os.environ.get("SPD_CODE", Path(__file__).parent.parent)).resolve()
    for file in (__file__, spd_core.__file__):
        if not Path(str(file)).resolve().is_relative_to(code):
            raise RuntimeError(f"{file} was imported, which is not in the launch's code, {code}")


def _leave(config: JobConfig, place: Place, stop: Stop) -> NoReturn:
    """After a save: wait for Slurm's kill, having asked for another turn if time ran out."""
    if config.cluster.kind == "local":
        sys.exit(STOPPED)
    _wait_for_reason(stop)
    if stop.signal == signal.SIGUSR2 and place.rank == 0:
        again = config.cluster.requeue == "on" and place.restart < config.launch.max_requeues
        if not again:
            print(f"time limit reached after {place.restart} requeues; not requeued again")
            sys.exit(1)
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True, timeout=60)
        print(f"saved; requeued, {place.restart + 1} of {config.launch.max_requeues}", flush=True)
    time.sleep(3600)
    sys.exit(128 + signal.SIGTERM)


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
