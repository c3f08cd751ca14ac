"""python -m spd_launch.status [LAUNCH] [--watch]: the launches, or the runs of one."""

import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from spd_core.targets.store import read_record
from spd_launch import ledger
from spd_launch.errors import exit_with
from spd_launch.ledger import LaunchDir
from spd_launch.observe import Observed, observe, parser
from spd_launch.run_record import read_status

if TYPE_CHECKING:
    from rich.console import Console


def main() -> int:
    options = parser(__doc__ or "", launch_required=False)
    options.add_argument("--watch", action="store_true", help="repeat until nothing is live")
    given = options.parse_args()
    if given.launch is None:
        return _list(given.out_dir)
    launch = ledger.find_launch(given.launch, given.out_dir)
    tasks = ledger.read_tasks(launch)
    while True:
        rows = observe(launch, tasks)
        _print_runs(launch, rows)
        _print_failures(launch, rows)
        if not given.watch or not any(row.live for row in rows):
            return 0
        time.sleep(5)


def _list(out_dir: Path) -> int:
    """From the files alone: one line for each launch."""
    from rich.table import Table

    table = Table("launch", "runs", "states", title=str(out_dir), title_justify="left")
    for launch in ledger.all_launches(out_dir):
        run_ids = ledger.read_run_ids(launch)
        statuses = [read_status(launch.run_dir(run_id)) for run_id in run_ids]
        counts = Counter(status.state for status in statuses if status)
        states = ", ".join(f"{n} {state}" for state, n in counts.most_common())
        table.add_row(launch.launch_id, str(len(run_ids)), states)
    _console().print(table)
    return 0


def _print_runs(launch: LaunchDir, rows: list[Observed]) -> None:
    from rich.table import Table

    title = f"{launch.launch_id}  ({ledger.read_info(launch)['kind']})"
    table = Table(title=title, title_justify="left")
    for name in ("#", "run", "state", "step", "seen", "attempt", "target", "job", "where"):
        table.add_column(name, no_wrap=name != "where")
    colours = {"finished": "green", "failed": "red", "no target": "red", "running": "cyan"}
    for row in rows:
        status = row.status
        seen = f"{_ago(status.heartbeat)} ago" if status.attempt else "-"
        colour = colours.get(row.state, "yellow")
        record = read_record(row.task.config, launch.run_dir(row.task.run_id).targets)
        seed = "" if record is None else f"seed {record.seed}"
        table.add_row(
            str(row.task.index), row.task.run_id, f"[{colour}]{row.state}[/]",
            f"{status.step}/{status.steps}", seen, str(status.attempt), seed,
            row.job_id, row.where,
        )  # fmt: skip
    _console().print(table)


def _print_failures(launch: LaunchDir, rows: list[Observed]) -> None:
    """In words: what failed of what, and what did not start because of it."""
    on_slurm = ledger.read_info(launch)["kind"] == "slurm"
    for row in rows:
        run_id = row.task.run_id
        hit = [r.task.run_id for r in rows if r.state == "no target" and r.task.after == run_id]
        if row.state == "failed" or hit:
            error = ledger.read_error(launch.run_dir(run_id)) if row.state == "failed" else ""
            print(f"{run_id}: {row.state}{f': {error}' if error else ''}")
            if hit:
                print(f"  so {len(hit)} run(s) did not start: {', '.join(hit)}")
            if on_slurm:
                print(f"  its log: python -m spd_launch.logs {launch.launch_id} {row.task.index}")
    if any(row.state == "no target" for row in rows):
        print(f"again, target and runs: python -m spd_launch.resume {launch.launch_id}")


def _console() -> "Console":
    """As wide as the terminal; wide enough for long names where the table goes into a pipe."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def _ago(moment: float) -> str:
    seconds = max(0, int(time.time() - moment))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


if __name__ == "__main__":
    exit_with(main)
