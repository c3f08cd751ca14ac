"""Which runs a command is about, and where findings about a whole launch lie.

A command takes runs and launches: a run as `spd_core.load_run` takes it; a launch by its folder,
its id in $SPD_OUT_DIR (else ./outputs) or a unique beginning or end of it, or `latest`. What is
found about a launch goes to `launches/ID/analysis/NAME/`: summary.json, and pictures.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from spd_core.config import load_config
from spd_core.load import find_run
from spd_core.run_dir import RunDir, read_status, written_whole

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
    ends = (str.startswith, str.endswith)
    found = [x for x in launches if reference and any(f(x.name, reference) for f in ends)]
    if len(found) > 1:
        names = ", ".join(x.name for x in found)
        raise ValueError(f"{reference!r} names {len(found)} launches: {names}")
    return found[0] if found else None


def runs_of(launch: Path) -> list[RunDir]:
    """The decompositions of a launch, in the order of its tasks.

    Raises:
        ValueError: a run's folder is gone, or the launch only trained targets.
    """
    rows = [json.loads(line) for line in (launch / TASKS).read_text().splitlines()]
    runs = [RunDir(launch.parent.parent / "runs" / row["run_id"]) for row in rows]
    runs = [r for r in runs if load_config(r.config_file).launch.goal == "decomposition"]
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


def check_checkpoints(runs: Sequence[RunDir]) -> None:
    """Refuse runs that have nothing to load yet.

    Raises:
        ValueError: names their folders, and how far each came.
    """
    lacking = [run_dir for run_dir in runs if not any(run_dir.checkpoints.glob("step_*"))]
    if not lacking:
        return
    told = []
    for run_dir in lacking:
        status = read_status(run_dir)
        told.append(f"{run_dir.path} ({'no status' if status is None else status.state})")
    others = [run_dir.path.name for run_dir in runs if run_dir not in lacking]
    advice = f", or give those that have one: {' '.join(others)}" if others else ""
    raise ValueError(
        f"no checkpoint in {', '.join(told)}: continue them with "
        f"`python -m spd_launch.resume LAUNCH`{advice}"
    )


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
