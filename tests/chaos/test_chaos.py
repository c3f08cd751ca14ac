"""A few minutes of `just chaos`, as one types it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disk import Disk
from runs import Run, differences, make_run, prepare, start, wait

from spd_core.run_dir import read_metrics

CHAOS = Path(__file__).parent / "chaos.py"


@pytest.mark.slow
def test_no_fault_on_this_machine_changes_what_a_run_becomes() -> None:
    done = subprocess.run(
        [sys.executable, CHAOS, "--faults", "30", "--minutes", "1"], capture_output=True, text=True
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout + done.stderr


def kill_when_it_has_gone_back_again(run: Run) -> None:
    file = run.run_dir.rewinds_file
    before = file.read_text() if file.exists() else ""
    start(run)
    deadline = time.monotonic() + 100
    while not file.exists() or file.read_text() == before:
        assert run.works and time.monotonic() < deadline, run.log.read_text()
        time.sleep(0.001)
    for rank in run.ranks:
        rank.kill()
    wait(run)


@pytest.mark.slow
@pytest.mark.parametrize("dp", [1, 2])
def test_a_run_killed_after_a_rewind_is_the_same_run(dp: int, tmp_path: Path) -> None:
    prepare()
    whole = make_run("rewinds, 2 ranks", tmp_path / "whole", f"dp={dp}")
    run = make_run("rewinds, 2 ranks", tmp_path / "killed", f"dp={dp}")
    start(whole)
    assert wait(whole) == [0] * dp
    # 24 steps, saved every 3: back to step 6 once, to step 12 three times.
    assert json.loads(whole.run_dir.rewinds_file.read_text()) == [0, 0, 1, 0, 3, 0, 0, 0, 0]
    for _ in range(2):
        kill_when_it_has_gone_back_again(run)
    start(run)
    assert wait(run) == [0] * dp
    assert differences(run, whole) == []


@pytest.mark.slow
def test_a_disk_gone_read_only_does_not_hide_what_went_wrong_before(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    if not disk.real:
        pytest.skip("a disk that breaks down needs root and mkfs.ext4")
    prepare()
    never = ("train.steps=1000000", "checkpoint.every_steps=1000000", "track.log_every=1000000")
    run = make_run(
        "tms with figures", disk.path, *never, "eval.every=1000000", "eval.slow_every=1000000"
    )
    run.orders = tmp_path
    try:
        start(run)
        deadline = time.monotonic() + 100
        while not read_metrics(run.run_dir) and time.monotonic() < deadline:
            time.sleep(0.1)
        heartbeat = run.run_dir.status_file.stat().st_mtime_ns
        while run.run_dir.status_file.stat().st_mtime_ns == heartbeat:
            assert run.works and time.monotonic() < deadline
            time.sleep(0.01)
        disk.break_down()  # seconds before the next heartbeat, which would fail of it
        (run.orders / "order-0").write_text("raise")
        assert wait(run) == [1]
        assert run.log.read_text().splitlines()[-1] == "ArithmeticError: told to fail"
        assert run.state == "running"  # nothing could be written: `status` sees that it has ended
    finally:
        for rank in run.ranks:
            rank.kill()
        disk.close()
