"""Steps after the runs, on this machine: what they need, and that they run one after another."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from launch_configs import SMALL
from launches import launched, set_state

from spd_launch.ledger import LaunchDir, find_launch, find_row, read_rows
from spd_launch.observe import judge
from spd_launch.resume import to_send
from spd_launch.run_record import read_error, read_status, write_status
from spd_launch.then import still_unmet, unmet

ROOT = Path(__file__).parent.parent.parent


def finish_step(launch: LaunchDir, name: str) -> None:
    folder = launch.folder(find_row(read_rows(launch), name))
    folder.path.mkdir(parents=True)
    run = read_status(launch.run_dir(read_rows(launch)[0].name))
    assert run is not None
    write_status(folder, run.model_copy(update={"state": "finished"}))


def test_a_step_needs_its_runs_and_the_steps_before_it(tmp_path: Path) -> None:
    launch = launched(tmp_path, "finished", "failed", launch__then=["evaluate", "report"])
    one, two, first, second, report = read_rows(launch)
    assert unmet(launch, first) is None
    assert unmet(launch, second) == (f"{second.name} needs 1 of 1; not finished: {two.name}")
    assert f"needs 4 of 4; not finished: {two.name}, {first.name}" in str(unmet(launch, report))
    set_state(launch, two.name, "finished")
    for step in (first, second):
        finish_step(launch, step.name)
    assert unmet(launch, report) is None and one.goal == "decomposition"


def test_what_a_step_needs_may_show_late(tmp_path: Path) -> None:
    launch = launched(tmp_path, "running", launch__then=["evaluate"])
    run, step = read_rows(launch)
    late = threading.Timer(1, set_state, [launch, run.name, "finished"])
    late.start()
    assert (
        still_unmet(launch, step, late_s=0) == f"{step.name} needs 1 of 1; not finished: {run.name}"
    )
    assert still_unmet(launch, step, late_s=30) is None
    late.join()


def test_any_run_will_do_if_that_is_asked(tmp_path: Path) -> None:
    any_ = {"launch__then": ["compare"], "launch__then_needs": "any"}
    launch = launched(tmp_path, "pending", "failed", **any_)
    one, _, compare = read_rows(launch)
    assert "needs 1 of 2" in str(unmet(launch, compare))
    set_state(launch, one.name, "finished")
    assert unmet(launch, compare) is None


def again(launch: LaunchDir, only: str | None = None) -> list[str]:
    rows = read_rows(launch)
    return [row.row.name for row in to_send(judge(launch, rows, {}), only, "slurm")]


def test_resume_sends_what_did_not_finish_and_what_comes_after_it(tmp_path: Path) -> None:
    launch = launched(tmp_path, "finished", "failed", "failed", launch__then=["evaluate", "report"])
    one, two, three, first, second, third, report = (row.name for row in read_rows(launch))
    for name in (first, report):  # a report of fewer runs, say
        finish_step(launch, name)
    assert again(launch) == [two, three, second, third, report]
    assert again(launch, only=two) == [two, second, report]
    for name in (two, three):
        set_state(launch, name, "finished")
    assert again(launch) == [second, third, report]
    assert again(launch, only=second) == [second, report]
    finish_step(launch, second)
    finish_step(launch, third)
    assert again(launch) == [] and one


def test_resume_sends_the_parts_that_are_missing_and_what_comes_after_them(tmp_path: Path) -> None:
    then = ["clustering", "cluster_distances", "report"]
    two = {"n": 2, "name": "x", "options": []}
    launch = launched(tmp_path, "finished", launch__then=then, launch__clustering=two)
    run, first, second, distances, report = (row.name for row in read_rows(launch))
    for name in (first, distances):
        finish_step(launch, name)
    assert again(launch) == [second, distances, report] and run
    missing = unmet(launch, find_row(read_rows(launch), distances))
    assert missing == f"{distances} needs 3 of 3; not finished: {second}"


@pytest.mark.slow
def test_steps_run_here_after_the_runs_and_a_failed_one_says_why(tmp_path: Path) -> None:
    out = tmp_path / "meine Läufe"

    def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "SPD_OUT_DIR": str(out)}
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip

    then = "launch.then=[evaluate,report]"
    done = run("spd_launch", "+experiment=tms_5-2", "cluster=local", *SMALL, then)
    assert done.returncode == 0, done.stdout + done.stderr
    launch = find_launch("latest", out)
    states = [read_status(launch.folder(row)) for row in read_rows(launch)]
    assert [status.state for status in states if status] == ["finished"] * 3
    [one] = [row for row in read_rows(launch) if row.goal == "evaluate"]
    assert one.name in done.stdout and "spd_analysis.report" in done.stdout

    # Its checkpoints are gone: the evaluation says so, and the report is not started.
    write_status(launch.folder(one), states[1].model_copy(update={"state": "pending"}))
    folder = launch.run_dir(read_rows(launch)[0].name)
    folder.checkpoints.rename(folder.path / "elsewhere")
    failed = run("spd_launch.resume", "latest")
    assert failed.returncode != 0 and "not started: report needs" in failed.stdout
    assert "no checkpoint in" in read_error(launch.folder(one))
