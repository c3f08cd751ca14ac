"""What was launched, on disk: plain files, each written whole or appended to.

A launch is one execution of one command; a run is one trained thing. `jobs.jsonl` gets a line for
each submission, local execution and cancellation, so a run's history stays readable. What only
looks at a launch reads `tasks.jsonl`, and leaves the runs' configs alone: a thousand take seconds.
"""

import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spd_core.config import RunConfig, load_config, named_run
from spd_core.run_dir import RunDir, write_atomic
from spd_core.targets.store import target_name
from spd_launch.compose import PACKAGE_ROOT
from spd_launch.config import JobConfig
from spd_launch.errors import LaunchError, nearest
from spd_launch.plan import LaunchPlan, Task, clean, make_plan, shape
from spd_launch.run_record import ERROR, Status, read_status, write_status
from spd_launch.snapshot import drop_snapshot
from spd_launch.steps import STEPS, Row, step_rows


@dataclass(frozen=True)
class LaunchDir:
    """The folder launches/LAUNCH_ID and every path in it."""

    path: Path

    @property
    def launch_id(self) -> str:
        return self.path.name

    @property
    def name(self) -> str:
        """What launch.name says, else the sweep's or the experiment's name."""
        return self.launch_id[16:-5]  # between 20261124-101530- and -08b3

    @property
    def launch_file(self) -> Path:
        return self.path / "launch.yaml"

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.json"

    @property
    def tasks_file(self) -> Path:
        return self.path / "tasks.jsonl"

    @property
    def jobs_file(self) -> Path:
        return self.path / "jobs.jsonl"

    @property
    def code(self) -> Path:
        return self.path / "code"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def run_dir(self, run_id: str) -> RunDir:
        return RunDir(self.path.parent.parent / "runs" / run_id)

    def folder(self, row: Row) -> RunDir:
        """Where the row's status is: a run has its own folder, a step one of this launch."""
        return (
            RunDir(self.path / "then" / row.name) if row.goal in STEPS else self.run_dir(row.name)
        )


def new_launch(runs: Sequence[tuple[dict[str, str], JobConfig]]) -> tuple[LaunchPlan, LaunchDir]:
    """Plan under a name that nobody has, and claim it with its folders.

    Raises:
        LaunchError: the plan is impossible, or out_dir cannot be written.
    """
    out_dir, stored = runs[0][1].launch.out_dir, stored_targets(runs)
    for _ in range(100):
        plan = make_plan(runs, time.strftime("%Y%m%d-%H%M%S"), secrets.token_hex(2), stored)
        launch = LaunchDir(out_dir / "launches" / plan.launch_id)
        try:
            _claim(launch, plan)
        except FileExistsError:
            continue
        except OSError as error:
            raise LaunchError(
                f"cannot write {error.filename or out_dir}: {error.strerror}; "
                "choose another folder with launch.out_dir=... or SPD_OUT_DIR"
            ) from None
        return plan, launch
    raise RuntimeError(f"no free launch name in {out_dir} after 100 tries")


def stored_targets(runs: Sequence[tuple[dict[str, str], JobConfig]]) -> set[str]:
    """The names of those targets of the runs that are trained already."""
    store = runs[0][1].launch.out_dir / "targets"
    names = {target_name(config) for _, config in runs}
    return {name for name in names if (store / name).is_dir()}


def _claim(launch: LaunchDir, plan: LaunchPlan) -> None:
    made: list[Path] = []
    try:
        for path in [launch.path, *(launch.run_dir(task.run_id).path for task in plan.tasks)]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            made.append(path)
        launch.logs.mkdir()  # Slurm drops the output of a job whose log folder is missing
    except OSError:
        for path in made:
            shutil.rmtree(path)
        raise


@contextmanager
def all_or_nothing(launch: LaunchDir, plan: LaunchPlan) -> Iterator[None]:
    """An error before anything ran leaves no folders behind."""
    try:
        yield
    except BaseException:
        if not launch.jobs_file.exists():
            for path in [launch.path, *(launch.run_dir(task.run_id).path for task in plan.tasks)]:
                shutil.rmtree(path)
            if plan.tasks[0].config.launch.snapshot != "off":
                drop_snapshot(PACKAGE_ROOT, plan.launch_id)
        raise


def flat(config: RunConfig) -> dict[str, Any]:
    """Dotted name -> value."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config.model_dump(mode="json"), ""))


def varying(configs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each config the values that are not the same in all."""
    missing = object()
    keys = dict.fromkeys(key for config in configs for key in config)
    several = [
        k for k in keys if any(c.get(k, missing) != configs[0].get(k, missing) for c in configs)
    ]
    return [{key: config[key] for key in several if key in config} for config in configs]


def mark(folder: RunDir, state: str) -> None:
    """Set the state of a run, or a step, from outside; step and attempt stay."""
    old = read_status(folder)
    if old is None:  # a step that has not started
        folder.path.mkdir(parents=True, exist_ok=True)
        old = pending(1)
    write_status(folder, Status.model_validate({**old.model_dump(), "state": state}))


def mark_failed(run_dir: RunDir, error: BaseException) -> None:
    """Set a run's state to failed, and keep what went wrong for `status`."""
    write_atomic(run_dir.path / ERROR, f"{type(error).__name__}: {error}\n")
    mark(run_dir, "failed")


def n_steps(config: JobConfig) -> int:
    """The steps of what this run trains: a decomposition or a target."""
    if config.launch.goal == "decomposition":
        return config.train.steps
    assert config.target.kind != "custom"
    return config.target.steps


def pending(steps: int) -> Status:
    return Status(
        state="pending", step=0, steps=steps, heartbeat=time.time(),
        attempt=0, job_id=None, host="",
    )  # fmt: skip


def note_jobs(launch: LaunchDir, kind: str, jobs: dict[str, str]) -> None:
    """Append one line: kind (submit, local, cancel) and run id -> job id."""
    line = {"kind": kind, "time": time.time(), "host": socket.gethostname(), "jobs": jobs}
    with open(launch.jobs_file, "ab+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)  # else what another command notes now could be cut off
        file.seek(0)
        whole = file.read().rpartition(b"\n")
        file.truncate(len(whole[0] + whole[1]))  # a kill, or a full disk, may have left half a line
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def latest_jobs(launch: LaunchDir) -> dict[str, str]:
    """run id -> the job it was last given."""
    return {run_id: jobs[0] for run_id, jobs in jobs_of_runs(launch).items()}


def jobs_of_runs(launch: LaunchDir) -> dict[str, list[str]]:
    """run id -> every job it was given, the newest first."""
    jobs: dict[str, list[str]] = {}
    for entry in _job_lines(launch):
        for run_id, job in entry["jobs"].items() if entry["kind"] != "cancel" else ():
            jobs.setdefault(run_id, []).insert(0, job)
    return jobs


def latest_places(launch: LaunchDir) -> dict[str, int]:
    """run id -> its number among the runs that share the job it was last given."""
    places: dict[str, int] = {}
    for entry in _job_lines(launch):
        if entry["kind"] != "cancel":
            n_in_job = Counter[str]()
            for run_id, job in entry["jobs"].items():
                places[run_id] = n_in_job[job]
                n_in_job[job] += 1
    return places


def _job_lines(launch: LaunchDir) -> list[dict[str, Any]]:
    """What was noted, but for a last line without its end: it is being written, or never was."""
    if not launch.jobs_file.exists():
        return []
    lines = launch.jobs_file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_info(launch: LaunchDir) -> dict[str, Any]:
    return yaml.safe_load(launch.launch_file.read_text())


def known_jobs(launch: LaunchDir) -> set[str]:
    """Every job that was ever noted."""
    return {job for entry in _job_lines(launch) for job in entry["jobs"].values()}


def read_rows(launch: LaunchDir) -> list[Row]:
    """The runs of a launch, then the targets that it trains, then the steps that follow."""
    rows = read_task_rows(launch)
    info = read_info(launch)
    return rows + step_rows(info["then"], rows, info["parts"])


def read_task_rows(launch: LaunchDir) -> list[Row]:
    """The runs of a launch, then the targets that it trains."""
    return [
        Row(line["index"], line["run_id"], line["overrides"], line["after"], line["goal"],
            line["target"], line["varies"])
        for line in _lines(launch)
    ]  # fmt: skip


def _lines(launch: LaunchDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in launch.tasks_file.read_text().splitlines()]


def read_tasks(launch: LaunchDir) -> list[Task]:
    """The launch's runs and targets with their frozen configs; see `load_tasks`."""
    return load_tasks(launch, read_task_rows(launch))


def load_tasks(launch: LaunchDir, rows: Sequence[Row]) -> list[Task]:
    """These runs and targets with their frozen configs.

    Raises:
        LaunchError: a run's folder is gone, or its config is of another version.
    """
    names = {row.name for row in rows}
    return [_read_task(launch, line) for line in _lines(launch) if line["run_id"] in names]


def read_task(launch: LaunchDir, run_id: str) -> Task:
    """One task, without the configs of the others.

    Raises:
        LaunchError: as `read_tasks`, or there is no such run.
    """
    for line in _lines(launch):
        if line["run_id"] == run_id:
            return _read_task(launch, line)
    raise LaunchError(f"no run {run_id!r} in {launch.tasks_file}")


def _read_task(launch: LaunchDir, line: dict[str, Any]) -> Task:
    file = launch.run_dir(line["run_id"]).config_file
    try:
        values = dict(load_config(file)) | {key: line[key] for key in ("cluster", "launch")}
        config = JobConfig.model_validate(values)
    except ValueError as error:
        raise LaunchError(f"{file} cannot be read: {error}") from None
    size = shape(config.cluster, config.dp)
    return Task(
        line["index"], line["run_id"], line["overrides"], config, *size, line["after"],
        line["goal"],
    )  # fmt: skip


def default_out_dir() -> Path:
    return Path(os.environ.get("SPD_OUT_DIR", "outputs")).expanduser().absolute()


def all_launches(out_dir: Path) -> list[LaunchDir]:
    """Oldest first."""
    files = sorted(out_dir.glob("launches/*/launch.yaml"), key=_written)
    return [LaunchDir(file.parent) for file in files]


def _written(launch_file: Path) -> int:
    """When it was launched; launch.yaml itself may be written again."""
    return (launch_file.parent / "tasks.jsonl").stat().st_mtime_ns


def find_launch(name: str, out_dir: Path) -> LaunchDir:
    """The launch with this name (the newest of several), unique prefix or ending, or `latest`.

    Raises:
        LaunchError: none or several.
    """
    launches = all_launches(out_dir)
    if not launches:
        raise LaunchError(
            f"no launches in {out_dir}; SPD_OUT_DIR or --out-dir names another folder"
        )
    named = [x for x in launches if name == "latest" or clean(name) == x.name]
    if named:
        return named[-1]
    ids = [launch.launch_id for launch in launches]
    found = [x for x in launches if x.launch_id.startswith(name) or x.launch_id.endswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise LaunchError(
            f"{name!r} names {len(found)} launches: {', '.join(x.launch_id for x in found)}"
        )
    raise LaunchError(f"no launch {name!r} in {out_dir}{nearest(name, ids)}")


def find(reference: str, out_dir: Path) -> tuple[LaunchDir, str | None]:
    """A launch by any of its names; or a run by its id or its name in runs.yaml, with its launch.

    Raises:
        LaunchError: it is neither, or stands for several launches.
    """
    try:
        run = named_run(reference)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    if Path(run, "config.yaml").is_file():
        folder = Path(run).resolve()
        run, out_dir = folder.name, folder.parent.parent
    if (out_dir / "runs" / run).is_dir():
        launches = reversed(all_launches(out_dir))
        having = [x for x in launches if run in (row.name for row in read_task_rows(x))]
        if having:  # the last one that worked on it: a pipeline only looks at it
            return next((x for x in having if run in latest_jobs(x)), having[0]), run
        raise LaunchError(f"no launch in {out_dir} has the run {run}")
    return find_launch(run, out_dir), None


def find_rows(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows of this step, or the one that `find_row` finds."""
    return [row for row in rows if row.goal == name and name in STEPS] or [find_row(rows, name)]


def find_row(rows: Sequence[Row], name: str) -> Row:
    """The row with this index, this name, or a unique part of it; first among the runs."""
    runs = [row for row in rows if row.goal not in STEPS]
    found = [row for row in rows if name in (str(row.index), row.name)]
    found = found or [row for row in runs if name in row.name]
    found = found or [row for row in rows if name in row.name]
    if len(found) == 1:
        return found[0]
    several = f"names {len(found)} runs" if found else "names no run"
    raise LaunchError(f"{name!r} {several} of this launch{nearest(name, [r.name for r in rows])}")
