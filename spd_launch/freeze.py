"""A launch written down before its first submission: the code, the plan, every run's frozen config.

Later edits of YAML files change nothing of what was launched.
"""

import ctypes
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from spd_core.run_dir import write_atomic
from spd_core.targets.store import target_name
from spd_launch.config import config_to_yaml, result_digest, run_config
from spd_launch.ledger import LaunchDir, flat, n_steps, pending, read_info, varying
from spd_launch.plan import LaunchPlan, Task
from spd_launch.snapshot import Snapshot


def record(launch: LaunchDir, plan: LaunchPlan, code: Snapshot, done: Sequence[str]) -> None:
    """Write what is launched, and every run's frozen config: all before the first submission.

    A run's folder says what is trained; where and how it runs stands in the launch's own. `done`
    are the ids of earlier runs that stand for those that were left out.
    """
    options = plan.tasks[0].config.launch
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
        "then": options.then,
        "then_needs": options.then_needs,
        "parts": options.parts(),
    }
    # Nobody reads these before launch.yaml is there, so they are synced together.
    for task in plan.tasks:
        run_dir = launch.run_dir(task.run_id)
        if run_dir.config_file.exists():
            continue  # it finished before, and this launch only looks at it
        run_dir.config_file.write_text(config_to_yaml(run_config(task.config)))
        run_dir.status_file.write_text(pending(n_steps(task.config)).model_dump_json() + "\n")
    differences = varying([flat(run_config(task.config)) for task in plan.tasks])
    rows = [_row(task, values) for task, values in zip(plan.tasks, differences, strict=True)]
    launch.tasks_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    launch.plan_file.write_text(json.dumps(describe(plan), indent=1) + "\n")
    _sync_file_system(launch.path)
    write_atomic(launch.launch_file, yaml.safe_dump(info, sort_keys=False))


def change_code(launch: LaunchDir, code: Snapshot) -> None:
    """What is sent from now on runs this code; nobody may take older runs for results of it."""
    changed = {"python_path": str(code.python_path), "commit": code.commit, "code": None}
    write_atomic(launch.launch_file, yaml.safe_dump(read_info(launch) | changed, sort_keys=False))


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


def _row(task: Task, varies: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": task.index,
        "run_id": task.run_id,
        "overrides": task.overrides,
        "after": task.after,
        "digest": result_digest(task.config),
        "goal": task.goal,
        "target": target_name(task.config),
        "varies": varies,
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
            "goal": array.tasks[0].goal,
            "after": array.tasks[0].after,
            "runs": [task.run_id for task in array.tasks],
        }
        for array in plan.arrays
    ]
    return {"launch_id": plan.launch_id, "arrays": arrays}
