"""What can follow the runs of a launch (`launch.then`): one table, and who waits for whom.

A step is one command line or several, one after another, in the launch's code; FOLDER stands for
the folder of one run, or of the launch. Steps come in the order they are given in: those of a run
after the run and its earlier steps, those of the launch after all runs and all earlier steps. A
new analysis needs one line here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spd_launch.errors import LaunchError, nearest


@dataclass(frozen=True)
class Step:
    of_each: Literal["run", "launch"]
    commands: tuple[str, ...]  # what stands after `python -m`


STEPS = {
    "evaluate": Step("run", ("spd_analysis.evaluate_run FOLDER",)),
    "clustering": Step("run", ("spd_analysis.clustering FOLDER",)),
    "distances": Step("run", (
        "spd_analysis.clustering FOLDER --name ensemble/seed_0 seed=0",
        "spd_analysis.clustering FOLDER --name ensemble/seed_1 seed=1",
        "spd_analysis.clustering FOLDER --name ensemble/seed_2 seed=2",
        "spd_analysis.clustering.distances FOLDER --name ensemble",
    )),
    "compare": Step("launch", ("spd_analysis.compare FOLDER",)),
    "report": Step("launch", ("spd_analysis.report FOLDER",)),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What has a state in a launch: a run, the training of a target, or a step.

    `name` is the run id, STEP-RUN_ID, or STEP; `after` the row that it comes after (a run after
    its target, a step of a run after the run); `goal` decomposition, target, or the step. `varies`
    holds the config values in which the runs of the launch differ.
    """

    index: int
    name: str
    overrides: dict[str, str]
    after: str | None
    goal: str
    target: str
    varies: dict[str, Any]


def check_steps(names: Sequence[str], goal: str) -> None:
    """Refuse steps that are not in the table, that come twice, or that have no runs to follow."""
    if names and goal != "decomposition":
        raise LaunchError(f"launch.then: steps follow runs, and launch.goal={goal} has none")
    for name in names:
        if name not in STEPS:
            raise LaunchError(f"launch.then: no step {name!r}{nearest(name, STEPS)}")
        if names.count(name) > 1:
            raise LaunchError(f"launch.then: {name!r} comes {names.count(name)} times")


def step_rows(names: Sequence[str], rows: Sequence[Row]) -> list[Row]:
    """The rows of these steps after those of the runs."""
    runs = [row for row in rows if row.goal == "decomposition"]
    found: list[tuple[str, str, str | None]] = []
    for step in names:
        match STEPS[step].of_each:
            case "run":
                found += [(step, f"{step}-{run.name}", run.name) for run in runs]
            case "launch":
                found.append((step, step, None))
    return [
        Row(len(rows) + i, name, {}, after, step, "", {})
        for i, (step, name, after) in enumerate(found)
    ]
