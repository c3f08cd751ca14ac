"""python -m spd_launch.cancel LAUNCH [TASK]: end its jobs; nothing continues them but `resume`.

With a run go the steps after it; the name of a step is all of its jobs.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from spd_core.run_dir import write_atomic
from spd_launch import ledger, slurm_state
from spd_launch.errors import LaunchError, exit_with
from spd_launch.ledger import LaunchDir
from spd_launch.observe import Observed, ask_slurm, judge, observe, parser, strangers
from spd_launch.pack import CANCELLED, owner_file
from spd_launch.slurm_state import LiveJob

MANY = 20  # live jobs, of which a person is asked once more


def main() -> int:
    options = parser(__doc__ or "", nargs="one")
    options.add_argument("--yes", action="store_true", help=f"do not ask, also for over {MANY}")
    options.add_argument("task", nargs="?", help="index or part of a run id, or a step; or all")
    given = options.parse_args()
    launch, run = ledger.find(given.launch, given.out_dir)
    wanted = given.task or run
    rows = ledger.read_rows(launch)
    ending = {row.name for row in rows}
    if wanted is not None:
        if ledger.read_info(launch)["kind"] == "local" and len(rows) > 1:
            raise LaunchError(
                "runs on this machine have one launcher, which ends with them: cancel all of them "
                f"(python -m spd_launch.cancel {launch.launch_id}) and resume the runs you want"
            )
        names = {row.name for row in ledger.find_rows(rows, wanted)}
        ending = {row.name for row in rows if row.name in names or row.after in names}
    in_queue = ask_slurm(launch)
    judged = judge(launch, rows, in_queue)
    observed = [row for row in judged if row.row.name in ending and row.state != "finished"]
    live = [row for row in observed if row.live]
    kept = {row.job_id for row in judged if row.live and row.row.name not in ending}
    if len(live) > MANY and not given.yes and sys.stdin.isatty():
        answer = input(f"cancel {len(live)} live jobs of {launch.launch_id}? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            return 1
    lost = strangers(launch, in_queue) if wanted is None else []
    slurm_state.cancel_jobs(lost)
    try:
        ledger.note_jobs(launch, "cancel", {row.row.name: row.job_id for row in live})
    finally:  # also where the disk is full, which may be why they are cancelled
        _end(launch, live, in_queue, kept)
    # Only now: a run that is being ended still saves, and says that it stopped.
    for row in observe(launch, [row.row for row in observed]):
        if not row.live and row.state not in ("finished", "failed"):
            ledger.mark(launch.folder(row.row), "cancelled")
    if lost:
        _wait_while(lambda: not ask_slurm(launch).keys().isdisjoint(lost))
        print(f"cancelled {len(lost)} job(s) that stood in no file of it")
    print(f"cancelled {len(live)} live run(s) of {launch.launch_id}")
    print(f"to go on: python -m spd_launch.resume {launch.launch_id}")
    return 0


def _end(
    launch: LaunchDir,
    live: Sequence[Observed],
    in_queue: Mapping[str, LiveJob],
    kept: Collection[str],
) -> None:
    """Ask for the end of these runs, and wait for it; jobs that others share are `kept`."""
    if ledger.read_info(launch)["kind"] == "local":
        # One process runs them one after another; a second signal would not let it save.
        for row in {row.job_id: row for row in live}.values():
            _end_here(row)
    else:
        for row in live:
            if row.job_id in kept:
                _end_beside_others(launch, row)
        given = ledger.jobs_of_runs(launch)
        jobs = {job for row in live for job in given[row.row.name]}  # two, where resumed at once
        slurm_state.cancel_jobs(sorted((jobs & in_queue.keys()) - {*kept}))
    rows = [row.row for row in live]
    _wait_while(lambda: any(row.live for row in observe(launch, rows)))


def _end_beside_others(launch: LaunchDir, row: Observed) -> None:
    """Its own process reads in the run's folder that it is to save and end.

    The state comes first, then the owner: a process looks at the one as it starts, which writes the
    other, so that it cannot miss both.
    """
    folder = launch.folder(row.row)
    if row.state != "running" or row.status.state != "running":
        ledger.mark(folder, "cancelled")  # so it will not start
    write_atomic(owner_file(folder), CANCELLED)


def _wait_while(alive: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while alive():
        if time.monotonic() > deadline:
            print(f"they have not ended after {timeout_s:.0f} s")
            return
        time.sleep(1)


def _end_here(row: Observed) -> None:
    if row.where not in ("", socket.gethostname()):
        raise LaunchError(f"{row.row.name} runs on {row.where}: cancel it there")
    with suppress(ProcessLookupError):
        os.kill(int(row.job_id.split("-")[-1]), signal.SIGTERM)


if __name__ == "__main__":
    exit_with(main)
