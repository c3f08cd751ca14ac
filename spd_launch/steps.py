"""What can follow the runs of a launch (`launch.then`): one table, and who waits for whom.

A step is a command line, `python -m MODULE FOLDER`, in the launch's code. FOLDER is that of one
run, or of the launch. Steps come in the order they are given in: those of a run after the run and
its earlier steps, those of the launch after all runs and all earlier steps. A step in parts is
several tasks for each run; how many, and with what options, `launch.clustering` and
`launch.harvest` say. A new analysis needs one line here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spd_launch.errors import LaunchError, nearest


@dataclass(frozen=True)
class Step:
    """`arguments` follow the folder; in them stand the name and number of the step's `parts`.

    The options among `parts` are those of the step that has the same name.
    """

    module: str
    of_each: Literal["part", "run", "launch"]
    parts: Literal["evaluate", "clustering", "harvest"] | None = None
    arguments: tuple[str, ...] = ()


STEPS = {
    "evaluate": Step("spd_analysis.evaluate_run", "run", "evaluate"),
    "compare": Step("spd_analysis.compare", "launch"),
    "report": Step("spd_analysis.report", "launch"),
    "clustering": Step(
        "spd_analysis.clustering", "part", "clustering",
        ("--name={name}/seed_{part}", "seed={part}"),
    ),
    "cluster_distances": Step(
        "spd_analysis.clustering.distances", "run", "clustering", ("--name={name}", "--n={n}")
    ),
    "harvest": Step(
        "spd_analysis.harvest", "part", "harvest", ("--name={name}", "--shard={part}/{n}")
    ),
    "merge_harvest": Step("spd_analysis.harvest.merge", "run", "harvest", ("--name={name}",)),
}  # fmt: skip
Parts = Mapping[str, Mapping[str, Any]]
"""launch.evaluate, launch.clustering and launch.harvest, as plain data."""


@dataclass(frozen=True)
class Row:
    """What has a state in a launch: a run, the training of a target, or a step.

    `name` is the run id, STEP-RUN_ID, STEP-PART-RUN_ID, or STEP; `after` the row that it comes
    after (a run after its target, a step of a run after the run); `goal` decomposition, target, or
    the step. `varies` holds the config values in which the runs of the launch differ.
    """

    index: int
    name: str
    overrides: dict[str, str]
    after: str | None
    goal: str
    target: str
    varies: dict[str, Any]
    part: int | None = None


def check_steps(names: Sequence[str], goal: str) -> None:
    """Refuse steps that are not in the table, that come twice, or that have no runs to follow."""
    if names and goal != "decomposition":
        raise LaunchError(f"launch.then: steps follow runs, and launch.goal={goal} has none")
    for name in names:
        if name not in STEPS:
            raise LaunchError(f"launch.then: no step {name!r}{nearest(name, STEPS)}")
        if names.count(name) > 1:
            raise LaunchError(f"launch.then: {name!r} comes {names.count(name)} times")
    for i, name in enumerate(names):
        parts = [other for other, step in STEPS.items() if step.parts == STEPS[name].parts]
        if STEPS[name].parts and parts[0] not in (name, *names[:i]):
            raise LaunchError(f"launch.then: {name!r} comes after {parts[0]!r}")


def step_rows(names: Sequence[str], rows: Sequence[Row], parts: Parts) -> list[Row]:
    """The rows of these steps after those of the runs."""
    runs = [row.name for row in rows if row.goal == "decomposition"]
    found: list[tuple[str, str, str | None, int | None]] = []
    for name in names:
        step = STEPS[name]
        match step.of_each:
            case "part":
                assert step.parts is not None
                numbers = range(parts[step.parts]["n"])
                found += [(name, f"{name}-{i}-{run}", run, i) for run in runs for i in numbers]
            case "run":
                found += [(name, f"{name}-{run}", run, None) for run in runs]
            case "launch":
                found.append((name, name, None, None))
    return [
        Row(len(rows) + i, name, {}, after, step, "", {}, part)
        for i, (step, name, after, part) in enumerate(found)
    ]


def step_command(row: Row, folder: Path, parts: Parts) -> list[str]:
    """What follows `python -m`; of what its parts are given, later words win over earlier ones."""
    step = STEPS[row.goal]
    if step.parts is None:
        return [step.module, str(folder)]
    given = parts[step.parts]
    options = given["options"] if row.goal == step.parts else []
    own = [word.format(**given, part=row.part) for word in step.arguments]
    return [step.module, str(folder), *options, *own]
