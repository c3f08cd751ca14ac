"""python -m spd_launch.resume LAUNCH [TASK]: continue the runs that are neither finished nor live.

They keep their ids, configs and the code of the launch, and go on from their newest checkpoints.
With a run goes the training of its target, where that has not finished.
"""

from pathlib import Path

from spd_launch import ledger
from spd_launch.__main__ import start
from spd_launch.errors import LaunchError, exit_with
from spd_launch.observe import observe, parser


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("task", nargs="?", help="index or part of the run id; default: all")
    given = options.parse_args()
    launch = ledger.find_launch(given.launch, given.out_dir)
    info = ledger.read_info(launch)
    tasks = ledger.read_tasks(launch)
    if given.task is not None:
        one = ledger.find_task(tasks, given.task)
        tasks = [task for task in tasks if task.run_id in (one.run_id, one.after)]
    rows = observe(launch, tasks)
    todo = [row.task for row in rows if not row.live and row.state != "finished"]
    if not todo:
        live = [row.task.run_id for row in rows if row.live]
        print(f"nothing to resume: {len(rows) - len(live)} finished, {len(live)} still live")
        return 0
    python_path = Path(info["python_path"])
    if not (python_path / "spd_launch").is_dir():
        raise LaunchError(f"the code of this launch is gone: {python_path}")
    for task in todo:
        ledger.mark(launch.run_dir(task.run_id), "pending")
    return start(launch, todo, info["kind"], python_path)


if __name__ == "__main__":
    exit_with(main)
