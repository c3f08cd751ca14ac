"""What one rank does, as Slurm starts it: real processes in the environment of a job."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_configs import config

from spd_launch import ledger
from spd_launch.freeze import record
from spd_launch.run_record import read_status
from spd_launch.snapshot import Snapshot
from spd_launch.task import OWNER_S

ROOT = Path(__file__).parent.parent.parent
LONG = {"train__steps": 10**6, "eval__every": 10**6, "eval__slow_every": 10**6,
        "checkpoint__every_steps": 10, "track__log_every": 10}  # fmt: skip


@pytest.fixture
def start(tmp_path):
    """Start rank 0 of a job's attempt; its output goes to the returned file."""
    runs = [({}, config("cpu", launch__out_dir=tmp_path, **LONG))]
    plan, launch = ledger.new_launch(runs)
    record(launch, plan, Snapshot(ROOT, None, "none"), [])
    run_id = plan.tasks[0].run_id
    started = []

    def run(job: str, restart: int):
        log = tmp_path / f"{job}-{restart}.log"
        env = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0",
               "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": job,
               "SLURM_RESTART_COUNT": str(restart), "PYTHONUNBUFFERED": "1"}  # fmt: skip
        with open(log, "w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "spd_launch.task", launch.path, run_id],
                cwd=ROOT, env=os.environ | env, stdout=file, stderr=file,
            )  # fmt: skip
        started.append(process)
        return process, log

    yield run, launch.run_dir(run_id)
    for process in started:
        process.kill()
        process.wait()


def wait_for(predicate, seconds=120):
    deadline = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.mark.slow
def test_an_attempt_that_slurm_started_elsewhere_ends_in_favour_of_the_next(start):
    start, run_dir = start
    first, first_log = start("7", 0)
    wait_for(lambda: [*run_dir.checkpoints.glob("step_*")])  # each is soon replaced
    other, other_log = start("8", 0)  # not the same job: it has no right to it
    assert other.wait(60) == 2 and "worked on by another process" in other_log.read_text()
    assert first.poll() is None
    owner = run_dir.path / ".owner"
    text = owner.read_text()
    owner.unlink()
    owner.mkdir()  # it cannot be read for a while, as on NFS where another machine replaces it
    time.sleep(OWNER_S + 1)
    owner.rmdir()
    owner.write_text(text)
    second, second_log = start("7", 1)
    assert first.wait(60) == 1
    assert "this job was started again elsewhere: this attempt ends" in first_log.read_text()
    wait_for(lambda: "continuing from step" in second_log.read_text())
    wait_for(lambda: read_status(run_dir).attempt == 2)
    assert second.poll() is None


@pytest.mark.slow
def test_a_packed_run_that_is_cancelled_as_it_starts_does_not_train(tmp_path):
    runs = [({"seed": str(s)}, config("cpu", seed=s, launch__out_dir=tmp_path)) for s in (0, 1)]
    plan, launch = ledger.new_launch(runs)
    record(launch, plan, Snapshot(ROOT, None, "none"), [])
    names = [task.run_id for task in plan.tasks if task.goal == "decomposition"]
    ledger.note_jobs(launch, "submit", dict.fromkeys(names, "7"))
    run_dir = launch.run_dir(names[0])
    (run_dir.path / ".owner").write_text("7 0")
    code = f"from spd_launch.task import run_one_of; run_one_of({str(launch.path)!r}, {names})"
    job = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
           "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}  # fmt: skip
    with open(run_dir.path / ".lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # as its attempt before would: it has looked, and waits
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | job)
        wait_for(lambda: (run_dir.path / ".owner").read_text() == "7 1")
        ledger.mark(run_dir, "cancelled")
    assert process.wait(60) == 1
    status = read_status(run_dir)
    assert (status.state, status.attempt) == ("cancelled", 0)
