"""Runs that have finished before: the same config, on the same code, in the same out_dir.

The config is compared without names, paths, cluster and W&B (`result_digest`), the code by what its
Python files hold (`code_digest`). Installed packages are not compared. Read are the task lists of
earlier launches, and of those runs alone that fit, small files.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from spd_launch.compose import PACKAGE_ROOT
from spd_launch.config import JobConfig, LaunchConfig, result_digest
from spd_launch.errors import LaunchError
from spd_launch.ledger import LaunchDir
from spd_launch.run_record import read_status
from spd_launch.snapshot import code_digest

Run = tuple[dict[str, str], JobConfig]
DIGEST = re.compile(r'"digest": "([0-9a-f]{16})"')
SHOWN = 5


def leave_out_done(runs: Sequence[Run], say: Callable[[str], None]) -> tuple[list[Run], list[str]]:
    """The runs to launch, and the ids of the finished ones that stand for the others.

    `launch.if_done` decides; `say` is told in one line which have finished, and where they are.

    Raises:
        LaunchError: if_done=ask without a terminal.
    """
    options = runs[0][1].launch
    found = {} if options.if_done == "rerun" else finished_runs([config for _, config in runs])
    if not found:
        return list(runs), []
    digests = [result_digest(config) for _, config in runs]
    ids = [found[digest] for digest in digests if digest in found]
    shown = ", ".join(ids[:SHOWN]) + (f" and {len(ids) - SHOWN} more" if ids[SHOWN:] else "")
    where = f"finished before, same config and code, in {options.out_dir / 'runs'}: {shown}"
    if not _is_left_out(options, len(runs), where):
        say(f"{where}; running again (launch.if_done=skip leaves out what has finished)")
        return list(runs), []
    say(f"skipping {len(ids)} of {len(runs)} {where} (launch.if_done=rerun runs them again)")
    todo = [run for run, digest in zip(runs, digests, strict=True) if digest not in found]
    return todo, ids


def _is_left_out(options: LaunchConfig, n_runs: int, where: str) -> bool:
    policy, terminal = options.if_done, sys.stdin.isatty()
    if policy == "auto":
        policy = "skip" if n_runs > 1 else "ask" if terminal else "rerun"
    if policy != "ask" or options.dry_run:
        return policy == "skip"
    if not terminal:
        raise LaunchError(f"launch.if_done=ask needs a terminal to ask in; {where}")
    return input(f"{where}\nrun again? [y/N] ").strip().lower() not in ("y", "yes")


def finished_runs(configs: Sequence[JobConfig]) -> dict[str, str]:
    """Result digest -> the id of the newest run that has finished with it, on the code of now.

    Without snapshots nobody knows on what code runs are, so none counts.
    """
    options = configs[0].launch
    wanted = {result_digest(c) for c in configs if c.launch.goal == "decomposition"}
    if options.snapshot == "off" or not wanted:
        return {}
    found: dict[str, str] = {}
    code: str | None = None
    for file in sorted(options.out_dir.glob("launches/*/tasks.jsonl")):
        rows = _rows_of(file, wanted)
        launch = LaunchDir(file.parent)
        if not rows or not launch.launch_file.is_file():
            continue
        code = code or code_digest(PACKAGE_ROOT, options.out_dir, options.snapshot_max_mb)
        if yaml.safe_load(launch.launch_file.read_text()).get("code") == code:  # older ones: none
            found |= {row["digest"]: row["run_id"] for row in rows if _finished(launch, row)}
    return found


def _rows_of(tasks_file: Path, digests: set[str]) -> list[dict[str, Any]]:
    """The decompositions of a launch with one of these digests; other lines are not parsed."""
    lines = tasks_file.read_text().splitlines()
    rows = [json.loads(line) for line in lines if not digests.isdisjoint(DIGEST.findall(line))]
    return [row for row in rows if row["goal"] == "decomposition"]


def _finished(launch: LaunchDir, row: dict[str, Any]) -> bool:
    status = read_status(launch.run_dir(row["run_id"]))
    return status is not None and status.state == "finished"
