"""Steps after the runs: what they are called, and which job waits for which."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch_configs import config

from spd_launch.errors import LaunchError
from spd_launch.plan import Array, Task, step_arrays, step_tasks
from spd_launch.steps import STEPS, Row, check_steps, step_command, step_rows
from spd_launch.submit import send_all

ROOT = Path(__file__).parent.parent.parent
RUN = config()
RUNS = [Row(i, f"run{i}", {}, "target-x", "decomposition", "x", {}) for i in range(3)]
TARGET = Row(3, "target-x", {}, None, "target", "x", {})


def tasks(names: list[str]) -> list[Task]:
    rows = step_rows(names, [*RUNS, TARGET], RUN.launch.parts())
    return step_tasks(rows, {row.name: RUN for row in RUNS})


def arrays(names: list[str], ends: dict[str | None, str], sent: list[str], needs: str = "all"):
    """(names of the tasks, dependency) of each array of the last step in `names`."""
    mine = [task for task in tasks(names) if task.goal == names[-1]]
    found = step_arrays(mine, ends, sent, needs)
    return [([task.run_id for task in array.tasks], dependency) for array, dependency in found]


def test_a_step_has_a_row_for_each_run_or_one() -> None:
    rows = step_rows(["evaluate", "report"], [*RUNS, TARGET], RUN.launch.parts())
    assert [(row.index, row.name, row.after, row.goal) for row in rows] == [
        (4, "evaluate-run0", "run0", "evaluate"),
        (5, "evaluate-run1", "run1", "evaluate"),
        (6, "evaluate-run2", "run2", "evaluate"),
        (7, "report", None, "report"),
    ]


def test_a_step_in_parts_has_several_rows_for_each_run() -> None:
    parts = config(launch__clustering={"n": 2, "name": "e", "options": ["alpha=2"]}).launch.parts()
    rows = step_rows(["clustering", "cluster_distances"], RUNS[:2], parts)
    assert [(row.index, row.name, row.after, row.part) for row in rows] == [
        (2, "clustering-0-run0", "run0", 0),
        (3, "clustering-1-run0", "run0", 1),
        (4, "clustering-0-run1", "run1", 0),
        (5, "clustering-1-run1", "run1", 1),
        (6, "cluster_distances-run0", "run0", None),
        (7, "cluster_distances-run1", "run1", None),
    ]
    assert step_command(rows[1], Path("/x"), parts) == [
        "spd_analysis.clustering", "/x", "alpha=2", "--name=e/seed_1", "seed=1",
    ]  # fmt: skip
    assert step_command(rows[4], Path("/x"), parts) == [
        "spd_analysis.clustering.distances", "/x", "--name=e", "--n=2",
    ]  # fmt: skip
    wide = {"checkpoints": "all", "steps": 50, "batch_size": None}
    for changes, words in ({}, []), ({"launch__evaluate": wide}, ["--all-steps", "--steps=50"]):
        parts = config(**changes).launch.parts()
        [evaluate] = step_rows(["evaluate"], RUNS[:1], parts)
        given = step_command(evaluate, Path("/x"), parts)
        assert given == ["spd_analysis.evaluate_run", "/x", *words]
    harvest = step_rows(["harvest"], RUNS[:1], parts)
    assert step_command(harvest[3], Path("/x"), parts)[2:] == ["--name=default", "--shard=3/4"]


def test_the_parts_of_a_run_wait_for_it_together_and_what_follows_waits_for_all_of_them() -> None:
    parts = {**RUN.launch.parts(), "clustering": {"n": 2, "name": "e", "options": []}}
    rows = step_rows(["clustering", "cluster_distances"], RUNS[:2], parts)
    all_tasks = step_tasks(rows, {row.name: RUN for row in RUNS})
    sent: list[tuple[list[str], str | None]] = []

    def send(array: Array, _n: int, dependency: str | None) -> dict[str, str]:
        sent.append(([task.run_id for task in array.tasks], dependency))
        return {t.run_id: f"{len(sent)}_{i}" for i, t in enumerate(array.tasks)}

    # The runs are elements 0 and 1 of job 7, which is at work.
    live = {"run0": "7_0", "run1": "7_1"}
    options = RUN.launch.model_copy(update={"then": ["clustering", "cluster_distances"]})
    all_tasks = [replace(t, config=RUN.model_copy(update={"launch": options})) for t in all_tasks]
    send_all(all_tasks, [*RUNS[:2], *rows], 100, live, send)
    assert sent == [
        (["clustering-0-run0", "clustering-1-run0"], "afterok:7_0"),
        (["clustering-0-run1", "clustering-1-run1"], "afterok:7_1"),
        (["cluster_distances-run0"], "afterok:1_0:1_1"),
        (["cluster_distances-run1"], "afterok:2_0:2_1"),
    ]
    sent.clear()
    send_all(all_tasks, [*RUNS[:2], *rows], 100, {}, send)  # runs that finished before
    assert sent[0] == ([row.name for row in rows[:4]], None)
    assert [dependency for _, dependency in sent[1:]] == ["afterok:1_0:1_1", "afterok:1_2:1_3"]


def test_wrong_steps_are_named() -> None:
    with pytest.raises(LaunchError, match="no step 'evaluat'; did you mean evaluate"):
        check_steps(["report", "evaluat"], "decomposition")
    with pytest.raises(LaunchError, match="'report' comes 2 times"):
        check_steps(["report", "report"], "decomposition")
    with pytest.raises(LaunchError, match="'cluster_distances' comes after 'clustering'"):
        check_steps(["cluster_distances", "clustering"], "decomposition")
    with pytest.raises(LaunchError, match="steps follow runs"):
        check_steps(["report"], "target")


def test_steps_of_runs_pair_with_the_elements_of_their_array() -> None:
    ends = {"run0": "7_0", "run1": "7_1", "run2": "7_2"}
    names = [f"evaluate-run{i}" for i in range(3)]
    assert arrays(["evaluate"], ends, [*ends.values()]) == [(names, "aftercorr:7")]
    last = {**ends, None: "9"}
    assert arrays(["evaluate"], last, ["9"]) == [(names, "aftercorr:7,afterok:9")]
    assert arrays(["evaluate"], last, ["9"], "any") == [(names, "aftercorr:7,afterany:9")]
    assert arrays(["evaluate"], {}, []) == [(names, None)]


def test_what_is_over_is_not_waited_for_and_what_lives_is_waited_for_alone() -> None:
    # run0 finished, run1 is element 1 of an older array, run2 was sent by itself.
    assert arrays(["evaluate"], {"run1": "7_1", "run2": "8"}, ["8"]) == [
        (["evaluate-run0"], None),
        (["evaluate-run1"], "afterok:7_1"),
        (["evaluate-run2"], "afterok:8"),
    ]


def test_a_step_of_a_run_that_shares_its_job_looks_itself_whether_that_finished() -> None:
    # A job of several runs fails with any of them, and aftercorr pairs no runs but elements.
    packed = RUN.model_copy(update={"launch": RUN.launch.model_copy(update={"pack": 2})})
    mine = [replace(task, config=packed) for task in tasks(["evaluate"])]
    ends: dict[str | None, str] = {"run0": "7_0", "run1": "7_0", "run2": "7_1"}
    found = step_arrays(mine, ends, [*ends.values()], "all")
    assert [([t.run_id for t in array.tasks], dependency) for array, dependency in found] == [
        (["evaluate-run0", "evaluate-run1"], "afterany:7_0"),
        (["evaluate-run2"], "afterany:7_1"),
    ]
    # run0 is over, and its evaluation too.
    [(_, dependency), *_] = step_arrays(mine[1:2], {"run1": "7_0"}, [], "all")
    assert dependency == "afterany:7_0"


@given(st.permutations(["7_0", "7_1", "7_2"]))
def test_elements_never_wait_for_another_run(jobs: list[str]) -> None:
    found = arrays(["evaluate"], dict(zip(["run0", "run1", "run2"], jobs, strict=True)), jobs)
    for names, dependency in found:
        word, _, job = (dependency or "").partition(":")
        for place, name in enumerate(names):
            parent = jobs[int(name.removeprefix("evaluate-run"))]
            assert parent == {"aftercorr": f"{job}_{place}", "afterok": job}[word]


def test_a_step_of_the_launch_waits_for_all() -> None:
    ends = {"run0": "7_0", "run1": "7_1", "run2": "8"}
    sent = [*ends.values()]
    assert arrays(["report"], ends, sent) == [(["report"], "afterok:7:8")]
    assert arrays(["report"], ends, sent, "any") == [(["report"], "afterany:7:8")]
    # Of an older array, parts may be over: those elements that live are waited for.
    assert arrays(["report"], ends, ["8"]) == [(["report"], "afterok:7_0:7_1:8")]
    assert arrays(["report"], {}, []) == [(["report"], None)]
    assert arrays(["compare", "report"], {**ends, None: "9"}, [*sent, "9"]) == [
        (["report"], "afterok:7:8:9")
    ]


def test_a_step_takes_one_process_of_its_runs_profile() -> None:
    [step] = step_tasks(
        step_rows(["evaluate"], RUNS[:1], RUN.launch.parts()),
        {"run0": config(dp=16, cluster__cpus_per_task=3)},
    )
    assert (step.nodes, step.tasks_per_node, step.config.cluster.cpus_per_task) == (1, 1, 3)


@pytest.mark.parametrize("name", STEPS)
def test_every_step_is_a_command(name: str) -> None:
    shown = [sys.executable, "-m", STEPS[name].module, "--help"]
    subprocess.run(shown, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
