"""python -m spd_launch.logs LAUNCH [TASK] [--rank R] [-f]: a run's log, and where it is."""

import sys
import time
from pathlib import Path

from spd_launch import ledger
from spd_launch.errors import LaunchError, exit_with
from spd_launch.ledger import LaunchDir
from spd_launch.observe import observe, parser, row_status
from spd_launch.run_record import read_error
from spd_launch.steps import STEPS, Row
from spd_launch.table import print_table

ASK_S = 10.0  # how often who follows a log asks Slurm whether the job still is


def main() -> int:
    options = parser(__doc__ or "", nargs="one")
    options.add_argument("task", nargs="?", help="index or part of the run id; default: all")
    options.add_argument("--rank", type=int, default=0)
    options.add_argument("-f", "--follow", action="store_true", help="until the run has ended")
    given = options.parse_args()
    launch, run = ledger.find(given.launch, given.out_dir)
    wanted = given.task or run
    rows, jobs = ledger.read_rows(launch), ledger.latest_jobs(launch)
    places = {name: place + given.rank for name, place in ledger.latest_places(launch).items()}
    # A launch of one run at a time writes to the terminal that it is in.
    if ledger.read_info(launch)["kind"] == "local" and not any(launch.logs.iterdir()):
        for row in rows if wanted is None else [ledger.find_row(rows, wanted)]:
            _say_if_failed(launch, row)
        raise LaunchError(f"{launch.launch_id} ran in a terminal, which kept its output")
    n_runs = sum(row.goal == "decomposition" for row in rows)
    if wanted is None and (n_runs or len(rows)) > 1 and not given.follow:
        lines = [
            [str(row.index), row.name, row_status(launch, row).state,
             str(log_file(launch, jobs.get(row.name), places.get(row.name)) or "not sent")]
            for row in rows
        ]  # fmt: skip
        print_table(["#", "name", "state", "log"], lines)
        print(f"one of them: python -m spd_launch.logs {launch.launch_id} 0   (-f follows it)")
        return 0
    row = ledger.find_row(rows, wanted or "0")
    file = log_file(launch, jobs.get(row.name), places.get(row.name))
    if row.after is not None and (file is None or not file.exists()):
        print(f"it has not started: first comes its {'run' if row.goal in STEPS else 'target'}")
        before = ledger.find_row(rows, row.after)
        file_before = log_file(launch, jobs.get(before.name), places.get(before.name))
        _show(launch, before, file_before, given.follow)
    _show(launch, row, file, given.follow)
    return 0


def _show(launch: LaunchDir, row: Row, file: Path | None, follow: bool) -> None:
    """The error first, where it failed: a log is long."""
    if file is None:
        print(f"{row.name} was not sent: python -m spd_launch.resume {launch.launch_id}")
        return
    _say_if_failed(launch, row)
    print(f"==> {file} <==", flush=True)
    if follow:
        _follow(file, launch, row)
    elif file.exists():
        sys.stdout.write(file.read_text(errors="replace"))
    else:
        print("not there yet: the job has not started, or has no such rank")


def _is_over(launch: LaunchDir, row: Row) -> bool:
    try:
        return not observe(launch, [row])[0].live
    except LaunchError:  # Slurm does not answer; the log may grow all the same
        return False


def _say_if_failed(launch: LaunchDir, row: Row) -> None:
    if row_status(launch, row).state == "failed":
        print(f"{row.name} failed: {read_error(launch.folder(row))}")


def log_file(launch: LaunchDir, job_id: str | None, process: int | None) -> Path | None:
    """The log of one process of a job, to which its attempts append; None where none was sent."""
    return None if job_id is None else launch.logs / f"{job_id}_{process}_log.out"


def _follow(file: Path, launch: LaunchDir, row: Row) -> None:
    position, asked, over = 0, -ASK_S, False
    while True:
        if time.monotonic() - asked >= ASK_S:
            asked, over = time.monotonic(), _is_over(launch, row)
        if file.exists():
            with open(file, errors="replace") as opened:
                opened.seek(position)
                sys.stdout.write(opened.read())
                sys.stdout.flush()
                position = opened.tell()
        if over:
            return
        time.sleep(1)


if __name__ == "__main__":
    exit_with(main)
