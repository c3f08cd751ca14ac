"""python -m spd_launch.logs LAUNCH [TASK] [--rank R] [-f]: a run's log, and where it is."""

import sys
import time
from pathlib import Path

from spd_launch import ledger
from spd_launch.errors import LaunchError, exit_with
from spd_launch.ledger import LaunchDir
from spd_launch.observe import observe, parser
from spd_launch.plan import Task


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("task", nargs="?", help="index or part of the run id; default: all")
    options.add_argument("--rank", type=int, default=0)
    options.add_argument("-f", "--follow", action="store_true", help="until the run has ended")
    given = options.parse_args()
    launch = ledger.find_launch(given.launch, given.out_dir)
    if ledger.read_info(launch)["kind"] == "local":
        raise LaunchError(f"{launch.launch_id} ran in a terminal, which kept its output")
    tasks = ledger.read_tasks(launch)
    n_runs = sum(task.config.launch.goal == "decomposition" for task in tasks)
    if given.task is None and (n_runs or len(tasks)) > 1 and not given.follow:
        for task in tasks:
            print(f"{task.index:4}  {task.run_id}  {log_file(launch, task, given.rank)}")
        return 0
    task = ledger.find_task(tasks, given.task or "0")
    if task.after is not None and not log_file(launch, task, given.rank).exists():
        print("it has not started: first comes its target")
        _show(launch, ledger.find_task(tasks, task.after), given.rank, given.follow)
    _show(launch, task, given.rank, given.follow)
    return 0


def _show(launch: LaunchDir, task: Task, rank: int, follow: bool) -> None:
    file = log_file(launch, task, rank)
    print(f"==> {file} <==", flush=True)
    if follow:
        _follow(file, launch, task)
    elif file.exists():
        sys.stdout.write(file.read_text(errors="replace"))
    else:
        print("not there yet: the job has not started")


def log_file(launch: LaunchDir, task: Task, rank: int) -> Path:
    """The log of the run's last job; attempts of one job append to one file."""
    job_id = ledger.latest_jobs(launch)[task.run_id]
    return launch.logs / f"{job_id}_{rank}_log.out"


def _follow(file: Path, launch: LaunchDir, task: Task) -> None:
    position = 0
    while True:
        over = not observe(launch, [task])[0].live
        if file.exists():
            with open(file, errors="replace") as opened:
                opened.seek(position)
                sys.stdout.write(opened.read())
                sys.stdout.flush()
                position = opened.tell()
        if over:
            return
        time.sleep(2)


if __name__ == "__main__":
    exit_with(main)
