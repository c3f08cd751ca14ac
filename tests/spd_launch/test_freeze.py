"""What is on disk before anything is sent, and that later edits do not reach it."""

import json
from pathlib import Path

import pytest
import yaml
from launch_configs import config
from test_command import ROOT

from spd_launch.compose import compose
from spd_launch.errors import LaunchError
from spd_launch.freeze import describe, record
from spd_launch.ledger import find_launch, new_launch, read_info, read_task, read_tasks
from spd_launch.snapshot import Snapshot
from spd_launch.validate import validate_all


def test_a_launch_on_disk(tmp_path: Path) -> None:
    runs = [({"seed": str(s)}, config(seed=s, launch__out_dir=str(tmp_path))) for s in (0, 1)]
    plan, launch = new_launch(runs)
    record(launch, plan, Snapshot(ROOT, None, None), [])
    assert {f.name for f in launch.path.iterdir()} == {
        "launch.yaml",
        "plan.json",
        "tasks.jsonl",
        "logs",
    }
    assert [t.run_id for t in read_tasks(launch)] == [t.run_id for t in plan.tasks]
    assert read_tasks(launch)[1].config == runs[1][1]
    assert [read_task(launch, t.run_id) for t in plan.tasks] == plan.tasks  # what a rank reads
    with pytest.raises(LaunchError, match="no run 'another'"):
        read_task(launch, "another")
    status = json.loads((launch.run_dir(plan.tasks[0].run_id).status_file).read_text())
    assert (status["state"], status["attempt"], status["steps"]) == ("pending", 0, 4)
    for name in ("latest", launch.launch_id[:15], launch.launch_id[-4:]):
        assert find_launch(name, tmp_path) == launch
    assert new_launch(runs)[1] != launch


def test_what_is_said_of_a_launch(tmp_path: Path) -> None:
    plan, launch = new_launch([({}, config("local", launch__out_dir=str(tmp_path)))])
    record(launch, plan, Snapshot(tmp_path / "code", "c0ffee", "d1ge57"), ["an-earlier-run"])
    info = read_info(launch)
    assert (info["commit"], info["code"], info["done"]) == ("c0ffee", "d1ge57", ["an-earlier-run"])
    assert info["python_path"] == str(tmp_path / "code") and info["kind"] == "local"
    assert json.loads(launch.plan_file.read_text()) == describe(plan)


def test_later_edits_of_yaml_change_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cluster, sweep = tmp_path / "slurm_templates" / "cluster", tmp_path / "sweeps"
    cluster.mkdir(parents=True)
    sweep.mkdir()
    shipped = (ROOT / "slurm_templates/cluster/local.yaml").read_text()
    (cluster / "mine.yaml").write_text(shipped)
    (sweep / "mine.yaml").write_text("global: {grid: {seed: [3]}}\nexperiments: {tms_5-2: }\n")
    arguments = ["+sweep=mine", "cluster=mine", f"launch.out_dir='{tmp_path}/out'"]
    plan, launch = new_launch(validate_all(compose(arguments, multirun=False)))
    record(launch, plan, Snapshot(ROOT, None, None), [])
    (cluster / "mine.yaml").write_text(shipped.replace("time_min: 60", "time_min: 1"))
    (sweep / "mine.yaml").write_text("global: {}\n")
    [task] = read_tasks(launch)
    assert (task.config.seed, task.config.cluster.time_min) == (3, 60)
    frozen = yaml.safe_load(launch.run_dir(task.run_id).config_file.read_text())
    assert frozen["seed"] == 3 and frozen["experiment"] == "tms_5-2"
