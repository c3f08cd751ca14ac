"""The commands on a run, as a user types them."""

import itertools
import shutil
import sys

import pandas as pd
import pytest

from spd_analysis.harvest import __main__ as harvest
from spd_analysis.harvest import merge

SMALL = ("--batches", "4", "batch_size=20", "top_k=5", "threshold=0.001")
TABLES = ("subcomponents", "examples", "cofirings")


@pytest.fixture
def command(monkeypatch, capsys):
    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", ["harvest", *map(str, arguments)])
        return module.main(), *capsys.readouterr()

    return run


def tables(run_dir, name):
    folder = run_dir.path / "harvests" / name / "tables"
    return [pd.read_parquet(folder / f"{table}.parquet") for table in TABLES]


def test_the_whole_is_its_shards_in_any_order(command, trained):
    run_dir = trained("a_run")
    code, out, _ = command(harvest, run_dir.path, *SMALL, "--name", "whole")
    assert code == 0 and "80 positions" in out and "next: pandas.read_parquet" in out
    for order in itertools.islice(itertools.permutations(range(3)), 0, 6, 2):
        name = "".join(map(str, order))
        for i in order:
            code, out, _ = command(
                harvest, run_dir.path, *SMALL, "--name", name, "--shard", f"{i}/3"
            )
            assert code == 0 and "next, when all are there: python -m spd_analysis" in out
        assert command(merge, run_dir.path, "--name", name)[0] == 0
        for one, other in zip(tables(run_dir, "whole"), tables(run_dir, name), strict=True):
            pd.testing.assert_frame_equal(one, other, check_exact=True)
    subcomponents, examples, _ = tables(run_dir, "whole")
    assert subcomponents["firings"].sum() > 0
    # A toy's examples are its inputs, and their importance is that of nothing else.
    assert all(len(row) == 5 for row in examples["inputs"]) and (examples["center"] == 0).all()


def test_a_shard_that_is_there_is_left_alone(command, trained):
    run_dir = trained("a_run")
    arguments = (run_dir.path, *SMALL, "--shard", "0/2")
    assert command(harvest, *arguments)[0] == 0
    file = run_dir.path / "harvests" / "default" / "shards" / "0_of_2" / "shard.npz"
    before = file.stat().st_mtime_ns
    code, out, _ = command(harvest, *arguments)
    assert code == 0 and "is there already" in out and file.stat().st_mtime_ns == before
    code, _, error = command(merge, run_dir.path)
    assert code == 2 and "lacks 1 of 2 shards, 1/2" in error
    assert not (file.parent.parent.parent / "tables").exists()
    for other in ((*arguments, "top_k=9"), (*arguments[:-1], "1/3")):
        code, _, error = command(harvest, *other)
        assert code == 2 and "another --name" in error
    shutil.rmtree(file.parent)
    assert command(harvest, *arguments, "top_k=9")[0] == 0


@pytest.mark.parametrize("arguments, message", [
    (("nowhere",), "no run 'nowhere'"),
    (("{run}", "--batches", "0"), "batches: Input should be"),
    (("{run}", "tpo_k=3"), "tpo_k"),
    (("{run}", "--batches", "2", "--shard", "0/3"), "3 shards of 2 batches"),
])  # fmt: skip
def test_bad_input_is_one_message_and_leaves_nothing(arguments, message, command, trained):
    run_dir = trained("a_run")
    given = [run_dir.path if a == "{run}" else a for a in arguments]
    code, _, error = command(harvest, *given)
    assert code == 2 and error.startswith("error: ") and message in error
    assert not (run_dir.path / "harvests").exists()


@pytest.mark.parametrize("shard", ["1", "2/2", "-1/2", "a/b"])
def test_shards_are_named_from_zero(shard, command, capsys):
    with pytest.raises(SystemExit):
        command(harvest, "a_run", f"--shard={shard}")
    assert "I from 0 to N - 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "-x"])
def test_a_name_is_that_of_one_folder(name, command, capsys):
    with pytest.raises(SystemExit):
        command(harvest, "a_run", f"--name={name}")
    assert "make a name" in capsys.readouterr().err
