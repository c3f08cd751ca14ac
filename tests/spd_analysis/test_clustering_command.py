"""The command on a run, as a user types it."""

import json
import sys

import pytest
from rich.console import Console

from spd_analysis.clustering.__main__ import cluster_run, main
from spd_analysis.clustering.config import DEFAULT, load_config

SMALL = ("data={n_samples: 128, batch_size: 64}",)


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["clustering", *map(str, arguments)])
        code = main()
        return code, *capsys.readouterr()

    return run


def test_the_command_leaves_history_and_picture_and_says_what_is_next(command, trained):
    run_dir = trained("a_run")
    code, out, _ = command(run_dir.path, *SMALL, "--name", "mine")
    assert code == 0
    folder = run_dir.path / "clusterings" / "mine"
    assert sorted(f.name for f in folder.iterdir()) == [
        "clustering.png", "history.json", "history.npz",
    ]  # fmt: skip
    record = json.loads((folder / "history.json").read_text())
    assert record["run"] == "a_run" and record["step"] == 6 and record["n_samples"] == 128
    assert len(record["subcomponents"]) + record["n_dead"] == 12
    assert "cost along the merge" in out and "of 5 features" in out
    assert f"next: python -m spd_launch +pipeline=clustering run={run_dir.path}" in out


def test_the_same_again_is_left_alone_and_another_is_refused(trained):
    run_dir, console = trained("a_run"), Console(quiet=True)
    config = load_config(DEFAULT, SMALL)
    folder = cluster_run(run_dir, "x", config, "cpu", console)
    before = (folder / "history.npz").stat().st_mtime_ns
    assert cluster_run(run_dir, "x", config, "cpu", console) == folder
    assert (folder / "history.npz").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="another clustering: give this one another --name"):
        cluster_run(run_dir, "x", load_config(DEFAULT, [*SMALL, "seed=1"]), "cpu", console)


@pytest.mark.parametrize("arguments, message", [
    (("nowhere",), "no run 'nowhere'"),
    (("{run}", "alhpa=1"), "alhpa"),
    (("{run}", *SMALL, "filter_dead_threshold=1.0"), "nothing to cluster"),
    (("{run}", 'modules=["x"]'), "matches none of the decomposed"),
    (("{unfinished}",), "no valid checkpoint"),
])  # fmt: skip
def test_bad_input_is_one_message_and_leaves_nothing(arguments, message, command, trained):
    run_dir = trained("a_run")
    unfinished = run_dir.path.with_name("unfinished")
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text(run_dir.config_file.read_text())
    places = {"{run}": run_dir.path, "{unfinished}": unfinished}
    code, _, error = command(*(places.get(a, a) for a in arguments))
    assert code == 2 and error.startswith("error: ") and message in error
    assert not (run_dir.path / "clusterings").exists()


@pytest.mark.parametrize("name", ["../x", "a/b/c", "a/", "/a"])
def test_a_name_is_that_of_a_clustering_or_one_of_an_ensemble(name, command, capsys):
    with pytest.raises(SystemExit):
        command("a_run", f"--name={name}")
    assert "make a name" in capsys.readouterr().err
