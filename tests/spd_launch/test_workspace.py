"""The view of a sweep, made by the real library; that a server takes it is seen in test_upload."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch_configs import config
from launches import launched

from spd_launch.freeze import record
from spd_launch.ledger import LaunchDir, new_launch, read_task_rows
from spd_launch.snapshot import Snapshot
from spd_launch.workspace import build_view

ROOT = Path(__file__).parents[2]


def swept(out_dir: Path, *learning_rates: float, **fields) -> LaunchDir:
    runs = [
        ({"lr": str(lr)}, config("local", train__lr__start=lr, launch__out_dir=out_dir, **fields))
        for lr in learning_rates
    ]
    plan, launch = new_launch(runs)
    record(launch, plan, Snapshot(launch.code, "abc", None), ["an-earlier-run"])
    return launch


def test_the_view_shows_the_runs_of_the_launch_and_what_it_sweeps(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    launch = swept(tmp_path, 0.1, 0.25)
    view = build_view(launch, "me", "spd")
    assert (view.entity, view.project, view.name) == ("me", "spd", launch.launch_id)
    filters = str(view.runset_settings.filters)
    assert launch.launch_id in filters and "an-earlier-run" in filters and " or " in filters.lower()
    columns = ["run:displayName", "config:train.lr.start", "summary:loss/total"]
    assert view.runset_settings.pinned_columns == columns
    words, axes = view.sections[0].panels
    assert "| train.lr.start | 0.1, 0.25 |" in words.markdown and "2 runs" in words.markdown
    assert [axis.metric.name for axis in axes.columns] == ["train.lr.start", "loss/total"]


def test_what_a_view_lacks_is_said(tmp_path: Path) -> None:
    launch = launched(tmp_path, "finished", "finished")
    command = [sys.executable, "-m", "spd_launch.workspace", "latest", "--out-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "W&B has no run of" in done.stderr
    url = launch.run_dir(read_task_rows(launch)[0].name).path / "wandb_url.txt"
    url.write_text("http://127.0.0.1:9/me/spd/runs/a\n")
    without = tmp_path / "without"
    (without / "wandb_workspaces").mkdir(parents=True)
    (without / "wandb_workspaces/__init__.py").write_text("raise ImportError")
    env = {**os.environ, "PYTHONPATH": f"{without}:{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install wandb-workspaces" in done.stderr
    assert not (launch.path / "wandb_view.txt").exists()
