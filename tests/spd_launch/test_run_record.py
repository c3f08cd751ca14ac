import json
from pathlib import Path

from spd_launch.run_record import Status, read_status, write_environment, write_status


def test_status_round_trip(make_run_dir):
    run_dir = make_run_dir("run")
    assert read_status(run_dir) is None
    status = Status(
        state="running", step=3, steps=9, heartbeat=1.5, attempt=2, job_id="7_1", host="h"
    )
    write_status(run_dir, status)
    assert read_status(run_dir) == status
    assert [f.name for f in run_dir.path.iterdir()] == ["status.json"]


def test_environment(make_run_dir):
    run_dir = make_run_dir("run")
    write_environment(run_dir, "abc")
    record = json.loads(run_dir.env_file.read_text())
    assert record["commit"] == "abc"
    assert Path(record["code"], "spd_core").is_dir() and record["torch"] and record["host"]
