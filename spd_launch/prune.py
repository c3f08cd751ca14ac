"""python -m spd_launch.prune [LAUNCH ...] [--yes]: remove the code of launches that are over.

Each launch keeps a copy of the code in its folder, and a commit in git (refs/snapshots/LAUNCH).
Without --yes nothing is removed, and what would be is listed. Runs and results stay; a run that
failed can then be resumed with `--with-code=now` only. A launch is over when each of its runs has
finished, failed or was cancelled, and none of its jobs is in the queue. Git may also hold snapshots
of launches that are in another folder of results, or deleted: --strays removes those.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from spd_launch import ledger, slurm_state
from spd_launch.compose import PACKAGE_ROOT
from spd_launch.errors import exit_with
from spd_launch.ledger import LaunchDir
from spd_launch.observe import DONE, judge, parser
from spd_launch.run_record import read_status
from spd_launch.snapshot import drop_snapshot, snapshots
from spd_launch.table import print_table


def main() -> int:
    options = parser(__doc__ or "", nargs="*")
    options.add_argument("--yes", action="store_true", help="remove what is listed")
    options.add_argument(
        "--strays", action="store_true",
        help="remove snapshots in git of launches that are not in this folder of results",
    )  # fmt: skip
    given = options.parse_args()
    launches = ledger.all_launches(given.out_dir)
    kept_by_git = snapshots(PACKAGE_ROOT)
    _strays([r for r in kept_by_git if not any(_belongs(r, x) for x in launches)], given.strays)
    if given.launches:
        launches = [ledger.find_launch(name, given.out_dir) for name in given.launches]
    refs = {x: [r for r in kept_by_git if _belongs(r, x)] for x in launches}
    held = [x for x in launches if refs[x] or _code_folders(x)]
    over = _over(held)
    lines = [
        [x.launch_id, f"{_size(x) / 1e6:.1f} MB", "removed" if given.yes else "can be removed"]
        if x in over
        else [x.launch_id, "", "kept: it is not over"]
        for x in held
    ]
    if not held:
        print(f"no launch in {given.out_dir} keeps its code")
        return 0
    total = sum(_size(x) for x in over) / 1e6
    print_table(["launch", "code", "what"], lines)
    if not given.yes:
        again = " ".join(["python -m spd_launch.prune", *given.launches, "--yes"])
        print(f"{total:.1f} MB of {len(over)} launch(es). Nothing is removed yet: {again}")
        return 0
    for launch in over:
        for folder in _code_folders(launch):
            shutil.rmtree(folder)
        for ref in refs[launch]:
            drop_snapshot(PACKAGE_ROOT, ref)
    print(f"freed {total:.1f} MB of {len(over)} launch(es); `git gc` frees what git still holds")
    return 0


def _strays(refs: Sequence[str], remove: bool) -> None:
    """Snapshots of launches that are not here: somebody may still run on them elsewhere."""
    if remove:
        for ref in refs:
            drop_snapshot(PACKAGE_ROOT, ref)
        print(f"removed {len(refs)} snapshot(s) of launches elsewhere from git")
    elif refs:
        print(
            f"git holds {len(refs)} snapshot(s) of launches that are deleted, or in another folder "
            "of results: --strays removes those"
        )


def _belongs(ref: str, launch: LaunchDir) -> bool:
    """A resumed launch may have LAUNCH-2 beside LAUNCH."""
    name, _, number = ref.rpartition("-")
    return ref == launch.launch_id or (name == launch.launch_id and number.isdigit())


def _code_folders(launch: LaunchDir) -> list[Path]:
    """code, and code-2 where it was resumed with newer code."""
    return [path for path in sorted(launch.path.glob("code*")) if path.is_dir()]


def _over(launches: Sequence[LaunchDir]) -> list[LaunchDir]:
    """Those whose runs and steps are all over; one call of squeue for all of them."""
    over = []
    for launch in launches:
        rows = ledger.read_task_rows(launch)
        statuses = [read_status(launch.folder(row)) for row in rows]
        if all(status is not None and status.state in DONE for status in statuses):
            over.append(launch)
    on_slurm = [x for x in over if ledger.read_info(x)["kind"] == "slurm"]
    names = ",".join(x.launch_id for x in on_slurm)
    live = slurm_state.live_jobs(names) if on_slurm else {}
    return [
        x
        for x in over
        if live.keys().isdisjoint(ledger.known_jobs(x))
        and (x in on_slurm or not any(row.live for row in judge(x, ledger.read_rows(x), {})))
    ]


def _size(launch: LaunchDir) -> int:
    files = [f for folder in _code_folders(launch) for f in folder.rglob("*") if f.is_file()]
    return sum(file.lstat().st_size for file in files)


if __name__ == "__main__":
    exit_with(main)
