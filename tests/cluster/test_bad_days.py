"""Days on which Slurm does not answer, keeps no accounts, or somebody cancels by hand."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import SMALL, Cluster, Command, Launch, status, until, wait_for, wait_until

from spd_launch import ledger

pytestmark = pytest.mark.usefixtures("target")


@contextmanager
def controller_comes_back(slurm: Cluster) -> Iterator[None]:
    try:
        yield
    finally:
        slurm.start_controller()


def test_a_controller_that_is_down_is_said_to_be(
    launch: Launch, command: Command, out: Path, slurm: Cluster
) -> None:
    folder, [task] = launch("+cluster.sbatch.hold=true")
    before = sorted((out / "launches").iterdir()), sorted((out / "runs").iterdir())
    words = "Unable to contact slurm controller"
    conf = slurm.impatient()
    with controller_comes_back(slurm):
        slurm.stop_controller()
        shown = command("spd_launch.status", "latest", SLURM_CONF=conf).stdout
        assert words in shown and "1 run(s): 1 pending" in shown
        for refused in (
            ["spd_launch", *SMALL, "seed=7"],
            ["spd_launch.cancel", "latest"],
            ["spd_launch.resume", "latest"],
        ):
            done = command(*refused, code=2, SLURM_CONF=conf)
            assert words in done.stderr and "Traceback" not in done.stderr
        after = sorted((out / "launches").iterdir()), sorted((out / "runs").iterdir())
        assert after == before and status(folder, task).state == "pending"
    [job] = ledger.latest_jobs(folder).values()
    assert slurm.run("squeue", "-h", "-o", "%i").split() == [job]
    assert "cancelled 1 live run(s)" in command("spd_launch.cancel", "latest").stdout


def test_a_controller_that_goes_down_between_two_arrays(
    command: Command, slurm: Cluster, out: Path, tmp_path: Path
) -> None:
    """By an sbatch that ends the controller when it has sent the first."""
    ends_it = tmp_path / "bin" / "sbatch"
    ends_it.parent.mkdir()
    pid = slurm.controller()
    ends_it.write_text(
        f'#!/bin/sh\n{shutil.which("sbatch")} "$@" || exit $?\n'
        # A zombie, which one that an earlier test started becomes, has no command line.
        f"kill {pid}; while grep -q . /proc/{pid}/cmdline 2>/dev/null; do sleep 0.1; done\n"
    )
    ends_it.chmod(0o755)
    two = [*SMALL, "-m", "dp=1,2", "launch.if_done=rerun", "+cluster.sbatch.hold=true"]
    path = f"{ends_it.parent}:{os.environ['PATH']}"
    with controller_comes_back(slurm):
        done = command("spd_launch", *two, code=2, PATH=path, SLURM_CONF=slurm.impatient())
        folder = ledger.find_launch("latest", out)
        assert "Unable to contact slurm controller" in done.stderr
        assert "What was sent before could not be cancelled" in done.stderr
        assert f"When Slurm answers again: python -m spd_launch.cancel {folder.launch_id}" in (
            done.stderr
        )
    shown = command("spd_launch.status", "latest").stdout
    assert "1 of these were not sent" in shown
    assert "cancelled 1 live run(s)" in command("spd_launch.cancel", "latest").stdout
    assert not slurm.run("squeue", "-h")


def test_cancelled_by_hand_and_without_accounts(
    launch: Launch, command: Command, slurm: Cluster, go: Path, out: Path, project: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    arguments = ["-m", "seed=1,0", "launch.max_parallel=1", until(go, "wait")]
    folder, [running, pending] = launch(*arguments)
    wait_until(folder, running, "running")
    jobs = ledger.latest_jobs(folder)
    slurm.run("scancel", jobs[pending.run_id])
    slurm.run("scancel", jobs[running.run_id])
    wait_for(lambda: not slurm.run("squeue", "-h"), 180, "both jobs to end")

    def both_cancelled() -> bool:  # accounting may learn of it a moment later than squeue
        shown = command("spd_launch.status", "latest").stdout
        # in the first line, and in each row
        return shown.count("cancelled by 0, not finished") == 3

    wait_for(both_cancelled, 180, "accounting to hold both as cancelled")

    for name in ("squeue", "sbatch", "scontrol", "scancel", "sinfo", "git"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    ours = {"PATH": tmp_path, "SPD_OUT_DIR": out, "PYTHONPATH": project}
    shown = subprocess.run(
        [sys.executable, "-m", "spd_launch.status", "latest"], cwd=project, check=True,
        env={**os.environ, **{k: str(v) for k, v in ours.items()}}, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert shown.count("ended, not finished") == 3 and "sacct" not in shown
    go.touch()
    assert "2 run(s)" in command("spd_launch.resume", "latest").stdout
    for task in (running, pending):
        wait_until(folder, task, "finished")
