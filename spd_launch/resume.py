"""python -m spd_launch.resume LAUNCH [TASK]: continue the runs that are neither finished nor live.

They keep their ids, configs and the code of the launch, and go on from their newest checkpoints.
With a run goes the training of its target, where that has not finished, and the steps after it.
"""

from collections.abc import Sequence
from pathlib import Path

from spd_launch import ledger, slurm_state
from spd_launch.__main__ import start
from spd_launch.errors import LaunchError, exit_with
from spd_launch.ledger import LaunchDir
from spd_launch.observe import Observed, observe, parser
from spd_launch.plan import Task, step_tasks
from spd_launch.steps import STEPS


def main() -> int:
    options = parser(__doc__ or "", nargs="one")
    options.add_argument("task", nargs="?", help="index or part of the run id; default: all")
    given = options.parse_args()
    launch = ledger.find_launch(given.launch, given.out_dir)
    info, rows = ledger.read_info(launch), ledger.read_rows(launch)
    only = None if given.task is None else ledger.find_row(rows, given.task).name
    observed = observe(launch, rows)
    todo = _to_send(observed, only, info["kind"])
    if not todo:
        live = [row for row in observed if row.live and row.row.name in (only, row.row.name)]
        print(f"nothing to resume: {len(rows) - len(live)} finished, {len(live)} still live")
        return 0
    python_path = Path(info["python_path"])
    if not (python_path / "spd_launch").is_dir():
        raise LaunchError(f"the code of this launch is gone: {python_path}")
    if info["kind"] == "slurm":  # steps that wait for what will not come
        slurm_state.cancel_jobs(sorted({row.job_id for row in todo if row.live}))
    for row in todo:
        if row.status.state != "pending":
            ledger.mark(launch.folder(row.row), "pending")
    return start(launch, _tasks(launch, todo), info["kind"], python_path)


def _to_send(observed: Sequence[Observed], only: str | None, kind: str) -> list[Observed]:
    """What is over and not finished, of all or of one run; then the steps that come after that."""
    wanted = {row.row.name for row in observed}
    if only is not None:
        [one] = [row.row for row in observed if row.row.name == only]
        wanted = {one.name, one.after}
    found = [
        row
        for row in observed
        if row.row.name in wanted and not row.live and row.state != "finished"
    ]
    runs = {row.row.name for row in found if row.row.goal == "decomposition"}
    steps = [
        row
        for row in observed
        if row.row.goal in STEPS and row not in found
        and (row.row.after in runs or (row.row.after is None and runs))
        and not (kind == "local" and row.live)  # another process goes on to it by itself
    ]  # fmt: skip
    return found + steps


def _tasks(launch: LaunchDir, todo: Sequence[Observed]) -> list[Task]:
    """The runs with their configs, and the steps with those of the runs that they follow."""
    steps = [row.row for row in todo if row.row.goal in STEPS]
    sent, followed = {row.row.name for row in todo}, {row.after for row in steps}
    rows = ledger.read_task_rows(launch)
    needed = [row for row in rows if row.name in sent | followed or row == rows[0]]
    loaded = ledger.load_tasks(launch, needed)
    configs = {task.run_id: task.config for task in loaded}
    return [task for task in loaded if task.run_id in sent] + step_tasks(steps, configs)


if __name__ == "__main__":
    exit_with(main)
