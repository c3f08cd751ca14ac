"""What was launched, on disk: plain files, each written whole or appended to.

A launch is one execution of one command; a run is one trained thing. `jobs.jsonl` gets a line for
each submission, local execution and cancellation, so a run's history stays readable.
"""

import ctypes
import json
import os
import secrets
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spd_core.config import config_to_yaml, load_config
from spd_core.run_dir import RunDir, write_atomic
from spd_core.targets.store import target_name
from spd_launch.compose import PACKAGE_ROOT
from spd_launch.config import JobConfig, result_digest, run_config
from spd_launch.errors import LaunchError, nearest
from spd_launch.plan import LaunchPlan, Task, make_plan, shape
from spd_launch.run_record import Status, read_status, write_status
from spd_launch.snapshot import Snapshot, drop_snapshot

ERROR = "error.txt"  # in a run's folder


@dataclass(frozen=True)
class LaunchDir:
    """The folder launches/LAUNCH_ID and every path in it."""

    path: Path

    @property
    def launch_id(self) -> str:
        return self.path.name

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
            if plan.tasks[0].config.launch.snapshot == "copy":
                drop_snapshot(PACKAGE_ROOT, plan.launch_id)
        raise


def record(launch: LaunchDir, plan: LaunchPlan, code: Snapshot, done: Sequence[str]) -> None:
    """Write what is launched, and every run's frozen config: all before the first submission.

    A run's folder says what is trained; where and how it runs stands in the launch's own. `done`
    are the ids of earlier runs that stand for those that were left out.
    """
    info = {
        "launch_id": plan.launch_id,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "cwd": str(Path.cwd()),
        "host": socket.gethostname(),
        "python": sys.executable,
        "python_path": str(code.python_path),
        "commit": code.commit,
        "code": code.digest,
        "done": list(done),
        "kind": plan.cluster.kind,
    }
    # Nobody reads these before launch.yaml is there, so they are synced together.
    for task in plan.tasks:
        run_dir = launch.run_dir(task.run_id)
        run_dir.config_file.write_text(config_to_yaml(run_config(task.config)))
        run_dir.status_file.write_text(_pending(task.config).model_dump_json() + "\n")
    launch.tasks_file.write_text("".join(json.dumps(_row(t)) + "\n" for t in plan.tasks))
    launch.plan_file.write_text(json.dumps(describe(plan), indent=1) + "\n")
    _sync_file_system(launch.path)
    write_atomic(launch.launch_file, yaml.safe_dump(info, sort_keys=False))


def _sync_file_system(folder: Path) -> None:
    """All that was written is on the disk: one call, where fsync of a thousand runs takes minutes.

    `os.sync` would also wait for every other disk of the machine, and for ever for a lost one.
    """
    if sys.platform != "linux":
        os.sync()
        return
    descriptor = os.open(folder, os.O_RDONLY)
    failed = ctypes.CDLL(None, use_errno=True).syncfs(descriptor)
    os.close(descriptor)
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))


def _row(task: Task) -> dict[str, Any]:
    return {
        "index": task.index,
        "run_id": task.run_id,
        "overrides": task.overrides,
        "after": task.after,
        "digest": result_digest(task.config),
        "cluster": task.config.cluster.model_dump(mode="json"),
        "launch": task.config.launch.model_dump(mode="json"),
    }


def describe(plan: LaunchPlan) -> dict[str, Any]:
    """The plan as plain data."""
    arrays = [
        {
            "cluster": array.cluster.name,
            "nodes": array.nodes,
            "tasks_per_node": array.tasks_per_node,
            "goal": array.tasks[0].config.launch.goal,
            "after": array.tasks[0].after,
            "runs": [task.run_id for task in array.tasks],
        }
        for array in plan.arrays
    ]
    return {"launch_id": plan.launch_id, "arrays": arrays}


def mark(run_dir: RunDir, state: str) -> None:
    """Set a run's state from outside; step and attempt stay."""
    old = read_status(run_dir)
    assert old is not None, f"no status of {run_dir.path.name}"
    write_status(run_dir, Status.model_validate({**old.model_dump(), "state": state}))


def mark_failed(run_dir: RunDir, error: BaseException) -> None:
    """Set a run's state to failed, and keep what went wrong for `status`."""
    write_atomic(run_dir.path / ERROR, f"{type(error).__name__}: {error}\n")
    mark(run_dir, "failed")


def read_error(run_dir: RunDir) -> str:
    """What a failed run failed of, in one line; empty where it had no time to say."""
    file = run_dir.path / ERROR
    return " ".join(file.read_text().split()) if file.exists() else ""


def n_steps(config: JobConfig) -> int:
    """The steps of what this run trains: a decomposition or a target."""
    if config.launch.goal == "decomposition":
        return config.train.steps
    assert config.target.kind != "custom"
    return config.target.steps


def _pending(config: JobConfig) -> Status:
    return Status(
        state="pending", step=0, steps=n_steps(config), heartbeat=time.time(),
        attempt=0, job_id=None, host="",
    )  # fmt: skip


def note_jobs(launch: LaunchDir, kind: str, jobs: dict[str, str]) -> None:
    """Append one line: kind (submit, local, cancel) and run id -> job id."""
    line = {"kind": kind, "time": time.time(), "host": socket.gethostname(), "jobs": jobs}
    with open(launch.jobs_file, "a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def latest_jobs(launch: LaunchDir) -> dict[str, str]:
    """run id -> the job it was last given."""
    jobs: dict[str, str] = {}
    if launch.jobs_file.exists():
        for line in launch.jobs_file.read_text().splitlines():
            entry = json.loads(line)
            jobs.update(entry["jobs"] if entry["kind"] != "cancel" else {})
    return jobs


def read_info(launch: LaunchDir) -> dict[str, Any]:
    return yaml.safe_load(launch.launch_file.read_text())


def read_run_ids(launch: LaunchDir) -> list[str]:
    return [row["run_id"] for row in _rows(launch)]


def read_tasks(launch: LaunchDir) -> list[Task]:
    """The launch's tasks with their frozen configs.

    Raises:
        LaunchError: a run's folder is gone, or its config is of another version.
    """
    return [_read_task(launch, row) for row in _rows(launch)]


def read_task(launch: LaunchDir, run_id: str) -> Task:
    """One task, without the configs of the others.

    Raises:
        LaunchError: as `read_tasks`, or there is no such run.
    """
    for row in _rows(launch):
        if row["run_id"] == run_id:
            return _read_task(launch, row)
    raise LaunchError(f"no run {run_id!r} in {launch.tasks_file}")


def _rows(launch: LaunchDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in launch.tasks_file.read_text().splitlines()]


def _read_task(launch: LaunchDir, row: dict[str, Any]) -> Task:
    file = launch.run_dir(row["run_id"]).config_file
    try:
        values = dict(load_config(file)) | {key: row[key] for key in ("cluster", "launch")}
        config = JobConfig.model_validate(values)
    except ValueError as error:
        raise LaunchError(f"{file} cannot be read: {error}") from None
    size = shape(config.cluster, config.dp)
    return Task(row["index"], row["run_id"], row["overrides"], config, *size, row["after"])


def default_out_dir() -> Path:
    return Path(os.environ.get("SPD_OUT_DIR", "outputs")).expanduser().absolute()


def all_launches(out_dir: Path) -> list[LaunchDir]:
    """Oldest first."""
    files = sorted(out_dir.glob("launches/*/launch.yaml"), key=lambda f: f.stat().st_mtime_ns)
    return [LaunchDir(file.parent) for file in files]


def find_launch(name: str, out_dir: Path) -> LaunchDir:
    """The launch that a unique prefix, a unique ending, or `latest` names.

    Raises:
        LaunchError: none or several.
    """
    launches = all_launches(out_dir)
    if not launches:
        raise LaunchError(
            f"no launches in {out_dir}; SPD_OUT_DIR or --out-dir names another folder"
        )
    if name == "latest":
        return launches[-1]
    ids = [launch.launch_id for launch in launches]
    found = [x for x in launches if x.launch_id.startswith(name) or x.launch_id.endswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise LaunchError(
            f"{name!r} names {len(found)} launches: {', '.join(x.launch_id for x in found)}"
        )
    raise LaunchError(f"no launch {name!r} in {out_dir}{nearest(name, ids)}")


def find_task(tasks: Sequence[Task], name: str) -> Task:
    """The task with this index or this unique part of its run id."""
    found = [t for t in tasks if name == str(t.index) or name == t.run_id]
    found = found or [t for t in tasks if name in t.run_id]
    if len(found) == 1:
        return found[0]
    several = f"names {len(found)} runs" if found else "names no run"
    raise LaunchError(
        f"{name!r} {several} of this launch{nearest(name, [t.run_id for t in tasks])}"
    )
