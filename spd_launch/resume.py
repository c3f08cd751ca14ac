"""python -m spd_launch.resume LAUNCH [TASK] [dp=N]: continue what is neither finished nor live.

They keep their ids and configs, and go on from their newest checkpoints: with the code of the
launch, or with what lies here now. With a run goes the training of its target, where that has not
finished, and the steps after it.
dp=N goes on with N processes: the same batches and masks, so the same run but for the last digits.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from spd_core.run_dir import write_atomic
from spd_launch import ledger, slurm_state
from spd_launch.__main__ import start
from spd_launch.config import JobConfig, config_to_yaml, run_config
from spd_launch.errors import LaunchError, exit_with
from spd_launch.freeze import change_code
from spd_launch.ledger import LaunchDir
from spd_launch.observe import Observed, ask_slurm, judge, parser, strangers
from spd_launch.plan import Task, shape, step_tasks
from spd_launch.snapshot import code_for
from spd_launch.steps import STEPS


def main() -> int:
    options = parser(__doc__ or "", nargs="one")
    options.add_argument(
        "task", nargs="*", metavar="TASK", help="index or part of the run id (default: all); dp=N"
    )
    options.add_argument(
        "--with-code", choices=["then", "now"], default="then",
        help="then: what the launch was last sent with (default); now: a new snapshot",
    )  # fmt: skip
    options.add_argument("--exclude", metavar="NODES", help="keep away from these nodes, on Slurm")
    given = options.parse_intermixed_args()
    changes = [word for word in given.task if "=" in word]
    names = [word for word in given.task if "=" not in word]
    if len(names) > 1 or len(changes) > 1 or not all(re.fullmatch(r"dp=\d+", c) for c in changes):
        raise LaunchError(f"{' '.join(given.task)!r}: one TASK at most, and dp=N; nothing else")
    launch, run = ledger.find(given.launch, given.out_dir)
    wanted = names[0] if names else run
    info, rows = ledger.read_info(launch), ledger.read_rows(launch)
    only = None if wanted is None else ledger.find_row(rows, wanted).name
    live = ask_slurm(launch)
    if unknown := strangers(launch, live):
        raise LaunchError(
            f"in the queue, but in no file of this launch: {' '.join(unknown)}; end them first: "
            f"python -m spd_launch.cancel {launch.launch_id}"
        )
    observed = judge(launch, rows, live)
    todo = to_send(observed, only, info["kind"])
    if not todo:
        mine = [row for row in observed if only in (None, row.row.name)]
        n_live = sum(row.live for row in mine)
        print(f"nothing to resume: {len(mine) - n_live} finished, {n_live} still live")
        return 0
    python_path = Path(info["python_path"])
    if given.with_code == "then" and not (python_path / "spd_launch").is_dir():
        raise LaunchError(
            f"the code of this launch is gone: {python_path}; --with-code=now takes what is here"
        )
    if changes:
        _change_dp(launch, todo, int(changes[0].removeprefix("dp=")))
    if given.with_code == "now":
        python_path = _code_now(launch)
    if info["kind"] == "slurm":  # steps that wait for what will not come
        slurm_state.cancel_jobs(sorted({row.job_id for row in todo if row.live}))
    for row in todo:
        if row.status.state != "pending":
            ledger.mark(launch.folder(row.row), "pending")
    tasks = _tasks(launch, todo)
    if given.exclude:
        tasks = [_away_from(task, given.exclude) for task in tasks]
    return start(launch, tasks, info["kind"], python_path)


def _away_from(task: Task, nodes: str) -> Task:
    """For this submission only: beside the nodes that the profile excludes."""
    cluster = task.config.cluster
    both = ",".join(str(x) for x in (cluster.sbatch.get("exclude"), nodes) if x)
    away = cluster.model_copy(update={"sbatch": {**cluster.sbatch, "exclude": both}})
    return replace(task, config=task.config.model_copy(update={"cluster": away}))


def _code_now(launch: LaunchDir) -> Path:
    """Take a snapshot for what is sent from now on, and write down that it is so."""
    taken = len(list(launch.path.glob("code*")))
    code, name = launch.path / f"code-{taken + 1}", f"{launch.launch_id}-{taken + 1}"
    options = ledger.load_tasks(launch, ledger.read_task_rows(launch)[:1])[0].config.launch
    snapshot = code_for(options, code, name)
    change_code(launch, snapshot)
    print(f"code    {snapshot.python_path}, commit {snapshot.commit}")
    return snapshot.python_path


def to_send(observed: Sequence[Observed], only: str | None, kind: str) -> list[Observed]:
    """What is over and not finished, of all or of one run; and the steps that come after that."""
    wanted = {row.row.name for row in observed}
    if only is not None:
        [one] = [row.row for row in observed if row.row.name == only]
        wanted = {one.name, one.after}
    found: list[Observed] = []
    again: set[tuple[str | None, str]] = set()  # run and goal of what is sent
    for row in observed:
        name, goal, after = row.row.name, row.row.goal, row.row.after
        due = name in wanted and not row.live and row.state != "finished"
        if goal in STEPS and not (kind == "local" and row.live):  # else its process goes on to it
            before = {run for run, other in again if other != goal}  # not parts of the same step
            due = due or (after in before if after is not None else bool(before))
        if due:
            found.append(row)
            if goal != "target":
                again.add((name if goal == "decomposition" else after, goal))
    return found


def _change_dp(launch: LaunchDir, todo: Sequence[Observed], dp: int) -> None:
    """Write another number of processes into the configs of the runs that go on.

    Raises:
        LaunchError: it does not fit a batch or the profile; then nothing is changed.
    """
    runs = [row.row for row in todo if row.row.goal == "decomposition"]
    changed = []
    for task in ledger.load_tasks(launch, runs):
        try:
            config = JobConfig.model_validate(dict(task.config) | {"dp": dp})
        except ValidationError as error:
            words = "; ".join(details["msg"] for details in error.errors())
            raise LaunchError(f"{task.run_id} cannot go on with dp={dp}: {words}") from None
        shape(config.cluster, dp)
        changed.append((task.run_id, config))
    for run_id, config in changed:
        write_atomic(launch.run_dir(run_id).config_file, config_to_yaml(run_config(config)))


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
