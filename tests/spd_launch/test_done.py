"""Runs that have finished before are found, and left out as `launch.if_done` says."""

import os
import time
from pathlib import Path

import pytest
from launch_configs import config
from test_command import LOCAL, ROOT, run

from spd_launch.config import JobConfig
from spd_launch.done import finished_runs, leave_out_done
from spd_launch.errors import LaunchError
from spd_launch.freeze import record
from spd_launch.ledger import new_launch
from spd_launch.snapshot import Snapshot, code_digest

TINY = [
    *LOCAL, "train.steps=2", "train.batch_size=16", "eval.batch_size=16", "eval.steps=1",
    "eval.every=2", "eval.slow_every=2", "target.steps=1000", "target.batch_size=512",
    "train.faithfulness_warmup.steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> str:
    return code_digest(ROOT, tmp_path_factory.mktemp("out"), max_mb=10)


def launched(code: str | None, state: str, configs: list[JobConfig]) -> list[str]:
    """The run ids of a launch whose runs, and targets, are in this state."""
    plan, launch = new_launch([({"seed": str(c.seed)}, c) for c in configs])
    record(launch, plan, Snapshot(ROOT, None, code), [])
    for task in plan.tasks:
        file = launch.run_dir(task.run_id).status_file
        file.write_text(file.read_text().replace('"pending"', f'"{state}"'))
    return [t.run_id for t in plan.tasks if not t.run_id.startswith("target-")]


def seeds(out: Path, n: int, **changes: object) -> list[JobConfig]:
    return [config("local", seed=i, launch__out_dir=str(out), **changes) for i in range(n)]


def left_out(configs: list[JobConfig]) -> tuple[list[int], list[str], str]:
    """The seeds that are launched, the ids that stand for the others, and what is said."""
    said: list[str] = []
    todo, ids = leave_out_done([({}, c) for c in configs], said.append)
    return [c.seed for _, c in todo], ids, "\n".join(said)


def test_a_sweep_leaves_out_what_has_finished(tmp_path: Path, code: str) -> None:
    ids = launched(code, "finished", seeds(tmp_path, 2))
    todo, done, said = left_out(seeds(tmp_path, 4))
    assert todo == [2, 3] and done == ids
    assert said.startswith("skipping 2 of 4") and str(tmp_path / "runs") in said
    assert "\n" not in said and all(run_id in said for run_id in ids)
    assert "launch.if_done=rerun" in said


@pytest.mark.parametrize("state", ["pending", "running", "stopped", "failed", "cancelled"])
def test_only_finished_runs_count(tmp_path: Path, code: str, state: str) -> None:
    launched(code, state, seeds(tmp_path, 2))
    assert left_out(seeds(tmp_path, 2)) == ([0, 1], [], "")


def test_other_code_other_configs_and_other_goals_do_not_count(tmp_path: Path, code: str) -> None:
    for other in ("0" * 16, None):
        launched(other, "finished", seeds(tmp_path, 2))
    launched(code, "finished", seeds(tmp_path, 2, train__steps=8))
    target = config("cpu", seed=0, launch__out_dir=str(tmp_path), launch__goal="target")
    launched(code, "finished", [target])
    assert left_out(seeds(tmp_path, 2)) == ([0, 1], [], "")
    assert finished_runs(seeds(tmp_path, 2, launch__snapshot="off")) == {}
    assert finished_runs(seeds(tmp_path / "elsewhere", 2)) == {}


def test_where_and_under_what_name_it_ran_does_not_matter(tmp_path: Path, code: str) -> None:
    elsewhere = [
        config(
            "cpu", seed=0, launch__out_dir=str(tmp_path), launch__name="x", experiment="mine",
            track__wandb__tags=["a"], cluster__time_min=9,
        )
    ]  # fmt: skip
    ids = launched(code, "finished", elsewhere)
    assert left_out(seeds(tmp_path, 2))[:2] == ([1], ids)


def test_the_choices_for_one_run(tmp_path: Path, code: str, monkeypatch) -> None:
    [run_id] = launched(code, "finished", seeds(tmp_path, 1))
    for policy, (todo, word) in {
        "auto": ([0], "running again"), "skip": ([], "skipping 1 of 1"), "rerun": ([0], ""),
    }.items():  # fmt: skip
        found, ids, said = left_out(seeds(tmp_path, 1, launch__if_done=policy))
        assert found == todo and word in said and ids == ([] if todo else [run_id])
    asking = seeds(tmp_path, 1, launch__if_done="ask")
    with pytest.raises(LaunchError, match=f"needs a terminal to ask in; .*{run_id}"):
        left_out(asking)
    monkeypatch.setattr("sys.stdin", Terminal())
    for answer, todo in {"": [], "n": [], "y": [0], "YES": [0]}.items():
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert left_out(asking)[0] == todo
        assert left_out(seeds(tmp_path, 1))[0] == todo


class Terminal:
    def isatty(self) -> bool:
        return True


@pytest.mark.slow
def test_a_thousand_runs_are_looked_through_in_seconds(tmp_path: Path, code: str) -> None:
    runs = seeds(tmp_path, 1000)
    launched(code, "finished", runs)
    before = time.process_time() + sum(os.times()[2:4])
    assert len(finished_runs(runs)) == 1000
    assert time.process_time() + sum(os.times()[2:4]) - before < 15


@pytest.mark.slow
def test_a_sweep_is_run_once(tmp_path: Path) -> None:
    first = run("spd_launch", "-m", *TINY, "seed=0,1", "launch.wait=true", out=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "(local)  2 run(s): 2 finished" in first.stdout  # here, the table comes at the end
    before = sorted((tmp_path / "runs").iterdir())
    more = run("spd_launch", "-m", *TINY, "seed=0,1,2", out=tmp_path)
    assert more.returncode == 0, more.stdout + more.stderr
    assert "skipping 2 of 3 finished before" in more.stdout
    assert all(folder.name in more.stdout for folder in before)
    [new] = {*(tmp_path / "runs").iterdir()} - {*before}
    assert "seed2" in new.name
    again = run("spd_launch", "-m", *TINY, "seed=0,1,2", out=tmp_path)
    assert again.returncode == 0 and again.stdout.endswith("nothing to do\n")
    assert len(list((tmp_path / "launches").iterdir())) == 2
