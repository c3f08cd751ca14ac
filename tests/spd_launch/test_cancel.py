"""Cancelling many at once is asked for again; cancelling itself is seen with real processes in
test_local.py and tests/cluster."""

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import launched
from test_command import ROOT
from test_errors import no_file_may_hold_anything

from spd_launch import ledger
from spd_launch.cancel import main
from spd_launch.run_record import read_status

LAUNCHER = "import time; time.sleep(600)  # spd_launch"  # the word by which one is told


def cancel(out: Path, answer: str) -> tuple[int, str]:
    """Its exit code and what it said, with this answer typed in a terminal."""
    ours, theirs = pty.openpty()
    line = [sys.executable, "-m", "spd_launch.cancel", "latest", f"--out-dir={out}"]
    with subprocess.Popen(
        line, cwd=ROOT, stdin=theirs, stdout=subprocess.PIPE, text=True
    ) as process:
        os.write(ours, f"{answer}\n".encode())
        said, _ = process.communicate(timeout=120)
    return process.returncode, said


def test_a_full_disk_does_not_keep_jobs_alive(tmp_path: Path) -> None:
    launch = launched(tmp_path, "pending")
    [run] = [row.name for row in ledger.read_rows(launch)]
    with subprocess.Popen([sys.executable, "-c", LAUNCHER]) as launcher:
        ledger.note_jobs(launch, "local", {run: f"local-{launcher.pid}"})
        done = subprocess.run(
            [sys.executable, "-m", "spd_launch.cancel", "latest", f"--out-dir={tmp_path}"],
            cwd=ROOT, capture_output=True, text=True, preexec_fn=no_file_may_hold_anything,
        )  # fmt: skip
        assert launcher.wait(timeout=60) != 0
    assert done.returncode == 2 and "File too large" in done.stderr, done.stderr


@pytest.fixture
def queue_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Programs in Slurm's place: the queue is a file of these lines."""
    queue, programs = tmp_path / "queue", tmp_path / "bin"
    programs.mkdir()
    for name, script in {
        "squeue": f"cat {queue}",
        "sacct": "exit 1",
        "scancel": f'for job in "$@"; do sed -i "/^$job|/d" {queue}; done',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def written(lines: str) -> Path:
        queue.write_text(lines)
        return queue

    return written


def test_of_a_run_that_was_resumed_twice_at_once_both_jobs_are_cancelled(
    tmp_path: Path, queue_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = launched(tmp_path, "running", "running", cluster="cpu")
    one, two = (row.name for row in ledger.read_task_rows(launch) if row.goal == "decomposition")
    for job in ("7", "8"):
        ledger.note_jobs(launch, "submit", {one: job})
    ledger.note_jobs(launch, "submit", {two: "9"})
    queue = queue_of("7|PENDING|(Priority)\n8|PENDING|(Priority)\n9|RUNNING|node1\n")
    monkeypatch.setattr("sys.argv", ["cancel", "latest", one, f"--out-dir={tmp_path}"])
    assert main() == 0
    assert queue.read_text() == "9|RUNNING|node1\n"


def test_a_packed_run_whose_process_is_starting_is_told_in_both_places(
    tmp_path: Path, queue_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = launched(tmp_path, "pending", "running", cluster="cpu")
    one, two = (row.name for row in ledger.read_task_rows(launch) if row.goal == "decomposition")
    ledger.note_jobs(launch, "submit", {one: "9", two: "9"})
    queue = queue_of("9|RUNNING|node1\n")
    monkeypatch.setattr("sys.argv", ["cancel", "latest", one, f"--out-dir={tmp_path}"])
    assert main() == 0
    status = read_status(launch.run_dir(one))
    assert status is not None and status.state == "cancelled"
    assert (launch.run_dir(one).path / ".owner").read_text() == "cancelled"
    assert not (launch.run_dir(two).path / ".owner").exists()
    assert queue.read_text() == "9|RUNNING|node1\n"


def test_many_live_jobs_are_cancelled_only_when_told_again(tmp_path: Path) -> None:
    launch = launched(tmp_path, *["pending"] * 21)
    runs = [row.name for row in ledger.read_rows(launch)]
    with subprocess.Popen([sys.executable, "-c", LAUNCHER]) as launcher:
        ledger.note_jobs(launch, "local", dict.fromkeys(runs, f"local-{launcher.pid}"))
        done, said = cancel(tmp_path, "n")
        assert done == 1 and "cancel 21 live jobs" in said and launcher.poll() is None
        done, said = cancel(tmp_path, "y")
        assert done == 0 and "cancelled 21 live run(s)" in said
        assert launcher.wait(timeout=60) != 0
    states = {read_status(launch.run_dir(run)).state for run in runs}  # type: ignore[union-attr]
    assert states == {"cancelled"}
