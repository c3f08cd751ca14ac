import json

import pytest
from rich.console import Console

from spd_analysis.launches import (
    analysis_folder,
    find_launch,
    find_runs,
    rewritten,
    runs_of,
    with_checkpoints,
)
from spd_launch.config import config_to_yaml


@pytest.fixture
def launched(tmp_path, make_config, make_run_dir, monkeypatch):
    """A launch of runs with these ids, as it is before any of them ran."""
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path))

    def make(launch_id, *run_ids, goal="decomposition"):
        folder = tmp_path / "launches" / launch_id
        folder.mkdir(parents=True)
        for run_id in run_ids:
            make_run_dir(run_id).config_file.write_text(config_to_yaml(make_config()))
        rows = [{"run_id": run_id, "goal": goal} for run_id in run_ids]
        rows.append({"run_id": "compare", "goal": "compare"})  # a step that follows the runs
        (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


@pytest.mark.parametrize("name", ["20261124-10-tms-aaaa", "20261124-10", "aaaa", "latest"])
def test_a_launch_is_found_as_status_finds_it(name, launched):
    launched("20261123-10-tms-bbbb", "old")
    assert find_launch(name) is None or name == "latest"
    new = launched("20261124-10-tms-aaaa", "one", "two")
    assert find_launch(name) == find_launch(str(new)) == new
    assert [r.path.name for r in find_runs([name])] == ["one", "two"]


def test_the_newest_launch_of_a_name_is_found_by_it(launched):
    launched("20261123-101530-my_sweep-aaaa", "old")
    launched("20261124-101530-my_sweep-wide-aaab", "wide")
    new = launched("20261124-101530-my_sweep-bbbb", "new")
    assert find_launch("my sweep") == find_launch("my_sweep") == new
    assert find_launch("sweep") is None


def test_a_name_of_runs_yaml_is_that_run_also_where_a_launch_has_it(
    launched, tmp_path, monkeypatch
):
    launched("20261124-101530-wide-bbbb", "one", "two")
    (tmp_path / "runs.yaml").write_text("wide: two\ngood: runs/one\n")
    monkeypatch.chdir(tmp_path)
    assert [r.path.name for r in find_runs(["wide"])] == ["two"]
    assert [r.path.name for r in find_runs(["good"])] == ["one"]
    assert [r.path.name for r in find_runs(["bbbb"])] == ["one", "two"]


def test_several_launches_of_one_beginning_are_named(launched):
    launched("2026-a", "one"), launched("2026-b", "two")
    with pytest.raises(ValueError, match="'2026' names 2 launches: 2026-a, 2026-b"):
        find_launch("2026")


def test_runs_and_launches_may_be_mixed_and_each_run_counts_once(launched):
    launched("2026-a", "one", "two")
    launched("2026-b", "three")
    found = find_runs(["two", "2026-a", "2026-b", "three"])
    assert [r.path.name for r in found] == ["two", "one", "three"]


def test_what_is_neither_is_refused(launched):
    launched("2026-a", "one")
    with pytest.raises(ValueError, match=r"no run 'nothing'"):
        find_runs(["nothing"])


def test_targets_are_no_decompositions(launched):
    folder = launched("2026-a", "a_target", goal="target")
    with pytest.raises(ValueError, match="targets only"):
        runs_of(folder)


def test_runs_without_a_checkpoint_are_left_out_of_a_launch_but_not_if_named(launched, capsys):
    launched("2026-a", "one", "two")
    with pytest.raises(ValueError, match=r"no checkpoint in .*one .*, .*two \(not launched\): "):
        with_checkpoints(["2026-a"], Console())
    one, two = find_runs(["2026-a"])
    (two.checkpoints / "step_2").mkdir(parents=True)
    assert [r.path.name for r in with_checkpoints(["2026-a"], Console())] == ["two"]
    assert f"no checkpoint: {one.path} (not launched)" in capsys.readouterr().out
    assert [r.path.name for r in with_checkpoints(["two"], Console())] == ["two"]
    for named in (["one", "two"], ["2026-a", "one"]):
        with pytest.raises(
            ValueError, match=r"no checkpoint in .*runs/one \(not launched\).*resume"
        ):
            with_checkpoints(named, Console())
    one.status_file.write_text('{"state": "failed"}')
    with pytest.raises(ValueError, match=r"runs/one \(failed\)"):
        with_checkpoints(["one"], Console())


def test_findings_lie_with_the_launch_or_beside_the_runs(launched, tmp_path):
    folder = launched("2026-a", "one", "two")
    runs = find_runs(["2026-a"])
    assert analysis_folder(["2026-a"], runs, "compare") == folder / "analysis" / "compare"
    assert analysis_folder(["one", "two"], runs, "x") == tmp_path / "analysis" / "x"


def test_a_folder_is_rewritten_whole_or_stays(tmp_path):
    folder = tmp_path / "analysis" / "x"
    with rewritten(folder) as new:
        (new / "old.txt").write_text("old")
    with pytest.raises(RuntimeError), rewritten(folder) as new:
        (new / "new.txt").write_text("new")
        raise RuntimeError
    assert [f.name for f in folder.iterdir()] == ["old.txt"]
    with rewritten(folder) as new:
        (new / "new.txt").write_text("new")
    assert [f.name for f in folder.iterdir()] == ["new.txt"]
    assert [f.name for f in folder.parent.iterdir()] == ["x"]
