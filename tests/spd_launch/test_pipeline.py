"""Steps in parts on a finished run: what is planned, and the whole of it here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from launch_configs import config

from spd_core.run_dir import RunDir
from spd_launch import ledger
from spd_launch.config import config_to_yaml, run_config
from spd_launch.errors import LaunchError
from spd_launch.ledger import pending
from spd_launch.pipeline import plan_pipeline
from spd_launch.run_record import read_status, write_status

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """What a run leaves, without its checkpoint; of 16 processes."""
    folder = RunDir(tmp_path / "out" / "runs" / "a_run")
    folder.path.mkdir(parents=True)
    folder.config_file.write_text(config_to_yaml(run_config(config(dp=16))))
    write_status(folder, pending(4).model_copy(update={"state": "finished"}))
    return folder


def plan(*arguments: str) -> dict[str, object]:
    _, job = plan_pipeline(list(arguments))
    return {**job.launch.parts(), "then": job.launch.then, "job": job}


def test_fields_go_where_they_belong(run_dir: RunDir) -> None:
    found = plan(
        "+pipeline=clustering", f"run={run_dir.path}", "n=3", "name=mine", "alpha=0.5",
        "draw={kind: mcmc, temperature: 0.1}", "cluster=cpu", "cluster.time_min=7",
        "launch.max_parallel=2",
    )  # fmt: skip
    options = ["alpha=0.5", "draw={kind: mcmc, temperature: 0.1}"]
    assert found["clustering"] == {"n": 3, "name": "mine", "options": options}
    assert found["then"] == ["clustering", "cluster_distances"]
    job = found["job"]
    assert (job.dp, job.cluster.name, job.cluster.time_min) == (1, "cpu", 7)
    assert job.launch.max_parallel == 2 and job.launch.out_dir == run_dir.path.parent.parent
    assert job.launch.name == "clustering-a_run"


def test_a_run_is_found_by_its_id(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPD_OUT_DIR", str(run_dir.path.parent.parent))
    found = plan("+pipeline=harvest", "run=a_run", "batches=9", "cluster=local")
    assert found["harvest"] == {"n": 4, "name": "default", "options": ["batches=9"]}


@pytest.mark.parametrize("arguments, message", [
    (["+pipeline=clustring", "run={}"], "no pipeline named 'clustring'; did you mean clustering"),
    (["+pipeline=harvest"], "run=FOLDER or run=ID"),
    (["+pipeline=harvest", "run=nowhere"], "no run 'nowhere'"),
    (["+pipeline=harvest", "run={}", "batchs=3"], r"launch.harvest.options: batchs.*batches"),
    (["+pipeline=clustering", "run={}", "alpha=x"], "launch.clustering.options: alpha"),
    (["+pipeline=clustering", "run={}", "n=0"], "launch.clustering.n=0"),
    (["+pipeline=clustering", "run={}", "n=1"], "n=1: distances need an ensemble of two"),
    (["+pipeline=clustering", "run={}", "seed=7"], "seed: members have seeds 0 to n - 1"),
    (["+pipeline=clustering", "run={}", "name=a/b"], "launch.clustering.name=a/b"),
    (["+pipeline=clustering", "run={}", "cluster=there"], "no cluster named 'there'"),
    (["+pipeline=clustering", "run={}", "launch.out_dir=x"], "lies in its run's folder"),
    (["+pipeline=clustering", "run={}", "alone"], "'alone' is no FIELD=VALUE"),
])  # fmt: skip
def test_what_is_wrong_is_named(arguments: list[str], message: str, run_dir: RunDir) -> None:
    given = [a.replace("{}", str(run_dir.path)) for a in arguments]
    with pytest.raises(LaunchError, match=message):
        plan_pipeline(given if "cluster=there" in given else [*given, "cluster=local"])


@pytest.mark.parametrize("state", ["pending", "running", "failed", None])
def test_a_run_that_has_not_finished_is_refused(state: str | None, run_dir: RunDir) -> None:
    if state is None:
        run_dir.status_file.unlink()
    else:
        write_status(run_dir, pending(4).model_copy(update={"state": state}))
    with pytest.raises(LaunchError, match=f"{state or 'has no status'}.*needs a finished run"):
        plan_pipeline(["+pipeline=harvest", f"run={run_dir.path}", "cluster=local"])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of outputs with a run that was trained here."""
    out = tmp_path_factory.mktemp("pipeline") / "my out"
    done = launch(out, "+experiment=tms_5-2", "train.steps=4", "train.batch_size=64",
                  "eval.batch_size=64", "eval.every=4", "eval.slow_every=4", "target.steps=1000",
                  "target.batch_size=512", f"launch.out_dir='{out}'",
                  "eval.metrics.permuted_ci_plots=null", "eval.metrics.uv_plots=null",
                  "eval.metrics.ci_histograms=null")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def launch(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "spd_launch", *arguments, "cluster=local"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "SPD_OUT_DIR": str(out)},
    )  # fmt: skip


@pytest.mark.slow
def test_an_ensemble_and_its_distances_and_members_added_later(project: Path) -> None:
    [run_dir] = [RunDir(path) for path in project.glob("runs/*")]
    before = run_dir.config_file.read_text(), run_dir.status_file.read_text()
    common = ("+pipeline=clustering", f"run={run_dir.path.name}", "data.n_samples=500")
    dry = launch(project, *common, "n=2", "launch.dry_run=true")
    assert dry.returncode == 0 and "--name=ensemble/seed_1 seed=1" in dry.stdout
    assert not (run_dir.path / "clusterings").exists()
    for n in (2, 3):
        done = launch(project, *common, f"n={n}")
        assert done.returncode == 0, done.stdout + done.stderr
        folder = run_dir.path / "clusterings" / "ensemble"
        arrays = np.load(folder / "distances" / "distances.npz")
        assert arrays["seeds"].tolist() == list(range(n))
        assert f"[{n + 1}/{n + 1}] cluster_distances-{run_dir.path.name}" in done.stdout
    seeds = [json.loads(f.read_text())["config"]["seed"] for f in folder.glob("*/history.json")]
    assert sorted(seeds) == [0, 1, 2]
    # The run is as it was, and nobody takes this launch for one that trained it.
    assert before == (run_dir.config_file.read_text(), run_dir.status_file.read_text())
    newest = ledger.find_launch("latest", project)
    assert ledger.read_info(newest)["code"] is None
    states = [read_status(newest.folder(row)).state for row in ledger.read_rows(newest)]
    assert states == ["finished"] * 5


@pytest.mark.slow
def test_shards_and_their_merge(project: Path) -> None:
    [run_dir] = [RunDir(path) for path in project.glob("runs/*")]
    done = launch(project, "+pipeline=harvest", f"run={run_dir.path}", "n=2", "batches=3")
    assert done.returncode == 0, done.stdout + done.stderr
    tables = run_dir.path / "harvests" / "default" / "tables"
    assert len(pd.read_parquet(tables / "subcomponents.parquet")) == 40
    refused = launch(project, "+pipeline=harvest", f"run={run_dir.path}", "n=3", "batches=3")
    assert refused.returncode != 0 and "another --name" in refused.stderr
