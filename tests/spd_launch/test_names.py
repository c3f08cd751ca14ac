"""Names that people give: runs.yaml for runs, launch.name for launches."""

import time
from pathlib import Path

import pytest
from launches import launched
from test_command import ROOT

from spd_core.config import named_run
from spd_core.load import find_run
from spd_launch.compose import compose
from spd_launch.errors import LaunchError
from spd_launch.ledger import find, find_launch, read_rows


def test_a_named_run_is_found_wherever_a_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = launched(tmp_path / "out put", "finished", "finished")
    one, two = (row.name for row in read_rows(launch))
    here = tmp_path / "here"
    here.mkdir()
    lines = [f"by-id: {one}", f"by path: ../out put/runs/{two}", "there: own/project/abc1"]
    (here / "runs.yaml").write_text("\n".join(lines))
    monkeypatch.chdir(here)
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "out put"))
    assert find_run("by-id").path == launch.run_dir(one).path
    assert find_run("by path").path.resolve() == launch.run_dir(two).path
    assert named_run("there") == "own/project/abc1" and named_run("unnamed") == "unnamed"
    assert find("by-id", tmp_path / "out put") == (launch, one)
    assert find("by path", tmp_path / "elsewhere") == (launch, two)
    assert find(two, tmp_path / "out put") == (launch, two)
    assert find("latest", tmp_path / "out put") == (launch, None)
    take = ["+experiment=tms_5-2", "cluster=local", "target.from_run=by path"]
    values = compose(take, multirun=False)[0].values
    assert values["target"]["from_run"] == str(launch.run_dir(two).path)


def test_a_wrong_runs_yaml_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for wrong in ("only words", "5", "a: b: c"):
        (tmp_path / "runs.yaml").write_text(wrong)
        with pytest.raises(ValueError, match=r"runs\.yaml is no list of NAME: RUN lines"):
            named_run("a")
    (tmp_path / "runs.yaml").write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"runs\.yaml is no list of NAME: RUN lines"):
        named_run("a")
    with pytest.raises(LaunchError, match=r"runs\.yaml"):
        find("a", tmp_path)
    (tmp_path / "runs.yaml").write_text("# none yet\n")
    assert named_run("a") == "a"


def test_a_launch_by_its_name_is_the_newest_of_that_name(tmp_path: Path) -> None:
    named = {"launch__name": "my first"}
    first = launched(tmp_path, "finished", **named)
    assert "-my_first-" in first.launch_id
    other = launched(tmp_path, "finished")
    assert find_launch("my first", tmp_path) == first
    time.sleep(0.01)
    second = launched(tmp_path, "finished", **named)
    assert second != first and find_launch("my first", tmp_path) == second
    assert find_launch(first.launch_id, tmp_path) == first
    assert find_launch("tms_5-2", tmp_path) == other
    with pytest.raises(LaunchError, match="no launch 'my frist'"):
        find_launch("my frist", tmp_path)


def test_a_cluster_is_the_one_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = (ROOT / "slurm_templates/cluster/local.yaml").read_text()
    for minutes in (7, 8):
        file = tmp_path / str(minutes) / "slurm_templates" / "cluster" / "mine.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(shipped.replace("time_min: 60", f"time_min: {minutes}"))
        monkeypatch.chdir(tmp_path / str(minutes))
        [run] = compose(["+experiment=tms_5-2", "cluster=mine"], multirun=False)
        assert run.values["cluster"]["time_min"] == minutes
