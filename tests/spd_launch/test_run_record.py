import json
from pathlib import Path

from spd_launch.run_record import Progress, Status, read_status, write_environment, write_status


def test_status_round_trip(make_run_dir):
    run_dir = make_run_dir("run")
    assert read_status(run_dir) is None
    status = Status(
        state="running", step=3, steps=9, heartbeat=1.5, attempt=2, job_id="7_1", host="h"
    )
    write_status(run_dir, status)
    assert read_status(run_dir) == status
    assert [f.name for f in run_dir.path.iterdir()] == ["status.json"]


def test_the_first_step_is_written_at_once_and_the_last_with_the_outcome(make_run_dir):
    run_dir = make_run_dir("run")
    progress = Progress(run_dir, 50, attempt=2, job_id="7")
    progress.at(11)
    first = read_status(run_dir)
    assert (first.state, first.step, first.steps) == ("running", 11, 50)
    assert (first.attempt, first.job_id) == (2, "7")
    progress.at(12)
    assert read_status(run_dir) == first  # a moment later: not worth a write
    progress.write("failed")
    assert (read_status(run_dir).state, read_status(run_dir).step) == ("failed", 12)


def test_other_ranks_write_nothing(make_run_dir):
    run_dir = make_run_dir("run")
    progress = Progress(None, 50, attempt=1, job_id="7")
    progress.at(1)
    progress.write("finished")
    assert read_status(run_dir) is None


def test_environment(make_run_dir):
    run_dir = make_run_dir("run")
    write_environment(run_dir)
    record = json.loads(run_dir.env_file.read_text())
    assert Path(record["code"], "spd_core").is_dir() and record["torch"] and record["host"]
