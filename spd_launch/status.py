"""python -m spd_launch.status [LAUNCH] [--watch] [--json]: the launches, or the runs of one.

From the files of the runs, and one call of squeue (and of sacct where a job was lost). Where Slurm
does not answer, what the runs wrote last is shown, and said to be that.
"""

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spd_launch import ledger
from spd_launch.errors import LaunchError, exit_with
from spd_launch.ledger import LaunchDir
from spd_launch.observe import Observed, ask_slurm, judge, parser, strangers
from spd_launch.pace import Pace, pace_of
from spd_launch.run_record import read_error, read_status, read_wandb_url
from spd_launch.steps import STEPS
from spd_launch.table import ago, clear_screen, coloured, duration, print_table, short

WATCH_S = 5
MAX_TOLD = 10  # of the runs that failed


@dataclass(frozen=True)
class Seen:
    """A launch at one moment; `problem` says why Slurm could not be asked."""

    rows: list[Observed]
    problem: str
    strangers: list[str]


def main() -> int:
    options = parser(__doc__ or "", nargs="?")
    options.add_argument("--watch", action="store_true", help="repeat until nothing is live")
    options.add_argument("--json", action="store_true", help="one JSON object, for programs")
    given = options.parse_args()
    if given.launch is None:
        return _list(given.out_dir, given.json)
    launch, run = ledger.find(given.launch, given.out_dir)
    while True:
        seen = look(launch, run)
        if given.json:
            print(json.dumps(as_data(launch, seen)), flush=True)
        else:
            clear_screen() if given.watch else None
            print_launch(launch, seen)
        if not given.watch or not any(row.live for row in seen.rows):
            return 0
        time.sleep(WATCH_S)


def look(launch: LaunchDir, run: str | None = None) -> Seen:
    """All of a launch; or one of its runs, with its target and what follows it."""
    rows = ledger.read_rows(launch)
    if run is not None:
        target = ledger.find_row(rows, run).after
        rows = [row for row in rows if run in (row.name, row.after) or row.name == target]
    try:
        live = ask_slurm(launch)
    except LaunchError as error:
        return Seen(judge(launch, rows, None), str(error), [])
    return Seen(judge(launch, rows, live), "", strangers(launch, live))


def _list(out_dir: Path, as_json: bool) -> int:
    """From the files alone: one line for each launch."""
    found = []
    for launch in ledger.all_launches(out_dir):
        rows = ledger.read_task_rows(launch)
        statuses = [read_status(launch.folder(row)) for row in rows]
        counts = Counter(status.state for status in statuses if status)
        found.append((launch.launch_id, len(rows), dict(counts.most_common())))
    if as_json:
        print(json.dumps([{"launch": i, "runs": n, "states": states} for i, n, states in found]))
        return 0
    print(f"{out_dir}")
    lines = [
        [launch_id, str(n), ", ".join(f"{count} {state}" for state, count in states.items())]
        for launch_id, n, states in found
    ]
    print_table(["launch", "runs", "states"], lines)
    print("\nthe runs of one: python -m spd_launch.status LAUNCH   (or `latest`)")
    return 0


def print_launch(launch: LaunchDir, seen: Seen) -> None:
    info = ledger.read_info(launch)
    runs = [row for row in seen.rows if row.row.goal not in STEPS]
    counts = Counter(row.state for row in runs).most_common()
    states = ", ".join(f"{n} {state}" for state, n in counts)
    print(f"{launch.launch_id}  ({info['kind']})  {len(runs)} run(s): {states}")
    if seen.problem:
        print(f"Slurm cannot be asked, so this is what the runs wrote last. {seen.problem}")
    _print_runs(launch, runs, [row for row in seen.rows if row.row.goal in STEPS and row.row.after])
    for row in seen.rows:
        if row.row.goal in STEPS and row.row.after is None:
            print(f"{row.row.name}  {coloured(row.state)}  {row.job_id}  {row.where}")
    _print_problems(launch, info["kind"], seen)


def _print_runs(launch: LaunchDir, runs: list[Observed], steps: list[Observed]) -> None:
    """A row per run, with a column for each step that follows every run."""
    names = list(dict.fromkeys(step.row.goal for step in steps))
    after: dict[tuple[str | None, str], list[str]] = {}
    for step in steps:
        after.setdefault((step.row.after, step.row.goal), []).append(step.state)
    header = ["#", "run", "state", "step", "rate", "left", "loss", "recon", "seen", "attempt",
              "target", "job", "where", *names, "W&B"]  # fmt: skip
    table = []
    for row in runs:
        status, pace = row.status, pace_of(launch.folder(row.row), row.status)
        of_steps = [_together(after.get((row.row.name, name), [])) for name in names]
        table.append([
            str(row.row.index), row.row.name, row.state, f"{status.step}/{status.steps}",
            *_pace_cells(pace, row), ago(status.heartbeat) if status.attempt else "",
            str(status.attempt or ""), _target_seed(launch, row.row.target), row.job_id, row.where,
            *of_steps, read_wandb_url(launch.folder(row.row)) or "",
        ])  # fmt: skip
    print_table(header, table)


def _together(states: list[str]) -> str:
    """Of one step of a run: its state, or how many of its parts are in which."""
    if len(states) < 2:
        return "".join(states)
    return ", ".join(f"{n} {state}" for state, n in Counter(states).most_common())


def _pace_cells(pace: Pace, row: Observed) -> list[str]:
    at_work = row.live and pace.steps_per_s is not None and row.status.state == "running"
    rate = f"{short(pace.steps_per_s)}/s" if at_work and pace.steps_per_s else ""
    left = duration(pace.left_s) if at_work and pace.left_s is not None else ""
    total, recon = pace.losses.get("total"), pace.recon
    return [rate, left, *("" if loss is None else f"{loss:.2e}" for loss in (total, recon))]


def _target_seed(launch: LaunchDir, target: str) -> str:
    file = launch.path.parent.parent / "targets" / target / "target.json"
    return f"seed {json.loads(file.read_text())['seed']}" if target and file.is_file() else ""


def _print_problems(launch: LaunchDir, kind: str, seen: Seen) -> None:
    """In words: what failed of what, what did not start because of it, and what to do."""
    rows, launch_id = seen.rows, launch.launch_id
    hit: dict[str | None, list[str]] = {}
    for row in rows:
        if row.state == "no target":
            hit.setdefault(row.row.after, []).append(row.row.name)
    bad = [row for row in rows if row.state == "failed" or row.row.name in hit]
    for row in bad[:MAX_TOLD]:
        name = row.row.name
        error = read_error(launch.folder(row.row)) if row.state == "failed" else ""
        print(f"{name}: {row.state}{f': {error}' if error else ''}")
        if name in hit:
            print(f"  so {len(hit[name])} run(s) did not start: {', '.join(hit[name])}")
        if kind == "slurm":
            print(f"  its log: python -m spd_launch.logs {launch_id} {row.row.index}")
    if len(bad) > MAX_TOLD:
        print(f"and {len(bad) - MAX_TOLD} more; all errors: --json")
    not_sent = sum(row.state == "not sent" for row in rows)
    if not_sent:
        print(f"{not_sent} of these were not sent: the launch was interrupted before them")
    if seen.strangers:
        print(
            f"in the queue, but in no file of this launch: {' '.join(seen.strangers)}; the launch "
            f"was killed as it sent them. End them: python -m spd_launch.cancel {launch_id}"
        )
    if any(not row.live and row.state != "finished" for row in rows):
        print(f"what did not finish, again: python -m spd_launch.resume {launch_id}")
    elif kind == "slurm" and any(row.live for row in rows):
        print(f"its logs: python -m spd_launch.logs {launch_id} -f")


def as_data(launch: LaunchDir, seen: Seen) -> dict[str, Any]:
    """The launch as plain data; rows are runs, targets and steps, as `goal` says."""
    info, rows = ledger.read_info(launch), []
    for row in seen.rows:
        folder = launch.folder(row.row)
        pace = pace_of(folder, row.status)
        rows.append({
            "index": row.row.index, "name": row.row.name, "goal": row.row.goal,
            "after": row.row.after, "varies": row.row.varies, "state": row.state, "live": row.live,
            "job_id": row.job_id, "where": row.where, "attempt": row.status.attempt,
            "step": row.status.step, "steps": row.status.steps,
            "heartbeat": row.status.heartbeat, "steps_per_s": pace.steps_per_s,
            "left_s": pace.left_s, "losses": pace.losses, "wandb_url": read_wandb_url(folder),
            "error": read_error(folder) if row.state == "failed" else "",
            "folder": str(folder.path),
        })  # fmt: skip
    kept = {key: info[key] for key in ("kind", "time", "command", "commit", "then", "then_needs")}
    return {
        "launch": launch.launch_id, **kept, "rows": rows,
        "slurm": seen.problem or "asked", "strangers": seen.strangers,
    }  # fmt: skip


if __name__ == "__main__":
    exit_with(main)
