"""Which runs a command is about, and where findings about a whole launch lie.

A command takes runs and launches: a run as `spd_core.load_run` takes it; a launch by its folder,
its id in $SPD_OUT_DIR (else ./outputs) or a unique beginning or end of it, its launch.name (the
newest of that name), or `latest`. What is found about a launch goes to
`launches/ID/analysis/NAME/`: summary.json, and pictures.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from spd_core.config import named_run
from spd_core.load import find_run
from spd_core.run_dir import RunDir, written_whole

TASKS = "tasks.jsonl"  # what makes a folder that of a launch


def find_launch(reference: str) -> Path | None:
    """The folder of a launch, or None where the reference names none.

    Raises:
        ValueError: it names several.
    """
    outputs = Path(os.environ.get("SPD_OUT_DIR", "outputs")).absolute()
    for folder in (Path(reference).absolute(), outputs / "launches" / reference):
        if (folder / TASKS).is_file():
            return folder
    files = sorted(outputs.glob(f"launches/*/{TASKS}"), key=lambda f: f.stat().st_mtime_ns)
    launches = [file.parent for file in files]
    if reference == "latest":
        return launches[-1] if launches else None
    if not reference or named_run(reference) != reference:  # runs.yaml comes first
        return None
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", reference)
    if named := [x for x in launches if x.name[16:-5] == name]:  # 20261124-101530-NAME-08b3
        return named[-1]
    ends = (str.startswith, str.endswith)
    found = [x for x in launches if any(f(x.name, reference) for f in ends)]
    if len(found) > 1:
        names = ", ".join(x.name for x in found)
        raise ValueError(f"{reference!r} names {len(found)} launches: {names}")
    return found[0] if found else None


def task_rows(launch: Path) -> list[dict[str, Any]]:
    """What the launcher wrote of every task: run_id, goal, overrides, varies, and more."""
    return [json.loads(line) for line in (launch / TASKS).read_text().splitlines()]


def runs_of(launch: Path) -> list[RunDir]:
    """The decompositions of a launch, in the order of its tasks.

    Raises:
        ValueError: the launch only trained targets.
    """
    ids = [row["run_id"] for row in task_rows(launch) if row["goal"] == "decomposition"]
    runs = [RunDir(launch.parent.parent / "runs" / run_id) for run_id in ids]
    if not runs:
        raise ValueError(f"{launch} trained targets only: there is no decomposition to look at")
    return runs


def find_runs(references: Sequence[str]) -> list[RunDir]:
    """The runs of all references, each of them once.

    Raises:
        ValueError: a reference names neither a run nor a launch.
    """
    found: dict[Path, RunDir] = {}
    for reference in references:
        launch = find_launch(reference)
        for run_dir in [find_run(reference)] if launch is None else runs_of(launch):
            found[run_dir.path.resolve()] = run_dir
    return list(found.values())


def state_of(run_dir: RunDir) -> str:
    """What the launcher wrote of the run: pending, running, finished, ...; or that it did not."""
    if not run_dir.status_file.exists():
        return "not launched"
    return json.loads(run_dir.status_file.read_text())["state"]


def with_checkpoints(references: Sequence[str], console: Console) -> list[RunDir]:
    """The runs of all references that can be loaded.

    Of launches, runs without a checkpoint are left out, which is said.

    Raises:
        ValueError: a reference names neither a run nor a launch, no run has a checkpoint, or one
            that is named by itself has none.
    """
    runs = find_runs(references)
    lacking = [run_dir for run_dir in runs if not any(run_dir.checkpoints.glob("step_*"))]
    if not lacking:
        return runs
    told = ", ".join(f"{run_dir.path} ({state_of(run_dir)})" for run_dir in lacking)
    if len(lacking) == len(runs) or not all(map(find_launch, references)):
        raise ValueError(
            f"no checkpoint in {told}: continue with `python -m spd_launch.resume LAUNCH`, "
            "or give other runs"
        )
    console.print(f"[yellow]left out, as there is no checkpoint: {told}", soft_wrap=True)
    return [run_dir for run_dir in runs if run_dir not in lacking]


def analysis_folder(references: Sequence[str], runs: Sequence[RunDir], name: str) -> Path:
    """Where findings about these runs go: the launch's folder, if they are one launch's, else
    `analysis/NAME` beside `runs/` and `launches/`."""
    launch = find_launch(references[0]) if len(references) == 1 else None
    return (launch or runs[0].path.parent.parent) / "analysis" / name


@contextmanager
def rewritten(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` once it is filled."""
    with written_whole(folder) as new:
        new.mkdir(parents=True)
        yield new
        shutil.rmtree(folder, ignore_errors=True)
