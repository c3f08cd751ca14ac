"""What can follow the runs of a launch (`launch.then`): one table, and who waits for whom.

A step is a command line, `python -m MODULE FOLDER`, in the launch's code. FOLDER is that of one
run, or of the launch. Steps come in the order they are given in: those of a run after the run and
its earlier steps, those of the launch after all runs and all earlier steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spd_launch.errors import LaunchError, nearest


@dataclass(frozen=True)
class Step:
    module: str
    of_each: Literal["run", "launch"]


STEPS = {
    "evaluate": Step("spd_analysis.evaluate_run", "run"),
    "compare": Step("spd_analysis.compare", "launch"),
    "report": Step("spd_analysis.report", "launch"),
}


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
