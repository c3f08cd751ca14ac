"""launch.wait=true: follow a launch on Slurm in a live table until nothing of it lives."""

import time
from collections import Counter
from contextlib import nullcontext

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from spd_launch.ledger import LaunchDir
from spd_launch.observe import Observed
from spd_launch.pace import pace_of
from spd_launch.status import WATCH_S, Seen, look, print_launch
from spd_launch.table import duration

LOOKS = 3  # a file system of the cluster may show a finished run's last word late
# Rows at the top of the table, which the terminal may be too short for.
ORDER = ("failed", "running", "completing", "configuring", "stopped", "pending")


def wait(launch: LaunchDir) -> int:
    """0 when every run and step has finished, 1 when all is over and some have not.

    A Slurm that does not answer is asked again. Ctrl-C ends the waiting, and nothing else.
    """
    console, said, looks_left = Console(), "", LOOKS
    try:
        with (
            Live(console=console, auto_refresh=False, transient=True)
            if console.is_terminal
            else nullcontext()
        ) as live:
            while True:
                seen = look(launch)
                finished = all(row.state == "finished" for row in seen.rows)
                looks_left = LOOKS if any(row.live for row in seen.rows) else looks_left - 1
                if finished or looks_left == 0:
                    break
                if live is not None:
                    live.update(picture(launch, seen, console.height), refresh=True)
                elif said != (said := _counts(seen)):  # into a file: one line for each change
                    print(said, flush=True)
                time.sleep(WATCH_S)
    except KeyboardInterrupt:
        print(f"the jobs go on: python -m spd_launch.status {launch.launch_id} --watch")
        raise
    print_launch(launch, seen)
    return 0 if finished else 1


def _counts(seen: Seen) -> str:
    counts = Counter(row.state for row in seen.rows).most_common()
    problem = f"; Slurm does not answer: {seen.problem}" if seen.problem else ""
    return ", ".join(f"{n} {state}" for state, n in counts) + problem


def picture(launch: LaunchDir, seen: Seen, height: int) -> Group:
    """Counts, and as many rows as a terminal of this height has room for; bad ones first."""
    table = Table()
    for title in ("name", "state", "step", "left", "loss", "where"):
        table.add_column(title, no_wrap=True)
    first = {state: place for place, state in enumerate(ORDER)}
    rows = sorted(seen.rows, key=lambda row: first.get(row.state, len(ORDER)))
    room = max(3, height - 7)
    for row in rows[:room]:
        table.add_row(*_cells(launch, row))
    more = f"and {len(rows) - room} more" if len(rows) > room else ""
    return Group(Text(f"{launch.launch_id}: {_counts(seen)}"), table, Text(more))


def _cells(launch: LaunchDir, row: Observed) -> list[str]:
    status, pace = row.status, pace_of(launch.folder(row.row), row.status)
    left = duration(pace.left_s) if row.state == "running" and pace.left_s is not None else ""
    loss = f"{pace.losses['total']:.2e}" if "total" in pace.losses else ""
    return [row.row.name, row.state, f"{status.step}/{status.steps}", left, loss, row.where]
