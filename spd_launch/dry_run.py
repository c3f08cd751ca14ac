"""launch.dry_run=true: what would be sent, word for word; nothing is written, nothing sent.

The names of launch and runs end in 0000 here, and jobs are called JOB1, JOB2, ...
"""

import shlex
from pathlib import Path

from spd_core.targets.store import target_name
from spd_launch import slurm_state
from spd_launch.compose import PACKAGE_ROOT, as_typed
from spd_launch.errors import LaunchError
from spd_launch.ledger import LaunchDir
from spd_launch.local import rank_command
from spd_launch.plan import Array, LaunchPlan, in_words, share, step_tasks
from spd_launch.snapshot import repository
from spd_launch.steps import STEPS, Row, step_rows
from spd_launch.submit import script, send_all, setup_file
from spd_launch.task import rank_environment


def show(plan: LaunchPlan) -> int:
    """Print for each array its runs, the sbatch script, the environment and one rank's command."""
    options = plan.tasks[0].config.launch
    launch, python_path = LaunchDir(options.out_dir / "launches" / plan.launch_id), PACKAGE_ROOT
    if options.snapshot == "copy":
        _, inside = repository(PACKAGE_ROOT)
        python_path = launch.code / inside
    rows = [
        Row(t.index, t.run_id, t.overrides, t.after, t.goal, target_name(t.config), {})
        for t in plan.tasks
    ]
    rows += step_rows(options.then, rows, options.parts())
    steps = [row for row in rows if row.goal in STEPS]
    tasks = plan.tasks + step_tasks(steps, {task.run_id: task.config for task in plan.tasks})
    n_sent = 0

    def send(array: Array, n_arrays: int, dependency: str | None) -> dict[str, str]:
        nonlocal n_sent
        n_sent += 1
        _show_array(launch, array, python_path)
        if array.cluster.kind == "slurm":
            _show_script(script(launch, array, python_path, n_arrays, dependency), n_sent, array)
        one = len(array.elements) == 1
        return {
            task.run_id: f"JOB{n_sent}" if one else f"JOB{n_sent}_{i}"
            for i, element in enumerate(array.elements)
            for task in element
        }

    send_all(tasks, rows, _array_limit(plan), {}, send)
    print("dry run: nothing written, nothing sent")
    return 0


def _array_limit(plan: LaunchPlan) -> int:
    if plan.cluster.kind == "slurm":
        try:
            return slurm_state.array_limit()
        except LaunchError as problem:
            print(f"how long an array may be is not known here: {str(problem).splitlines()[0]}")
    return len(plan.tasks)


def _show_array(launch: LaunchDir, array: Array, python_path: Path) -> None:
    cluster = share(array.cluster, array.pack)
    place = "here" if cluster.kind == "local" else f"partition {cluster.partition or '(default)'}"
    print(
        f"cluster={cluster.name}, {place}: {in_words(array.tasks)}, each {array.nodes} node(s) x "
        f"{array.tasks_per_node} process(es), {cluster.time_min} min"
    )
    if array.pack > 1:
        shared = "at a time here" if cluster.kind == "local" else "share one array task"
        print(f"  launch.pack: {array.pack} runs {shared}, each on {cluster.cpus_per_task} core(s)")
    for task in array.tasks:
        after = "" if task.after is None else f"   after {task.after}"
        print(f"  {task.run_id}   {as_typed(task.overrides)}{after}")
    print("  each rank's environment:")
    for name, value in rank_environment(cluster, python_path).items():
        print(f"    {name}={shlex.quote(value)}")
    print(f"  one rank's command:\n    {shlex.join(rank_command(launch, array.tasks[0]))}")


def _show_script(text: str, number: int, array: Array) -> None:
    if array.cluster.setup is not None:
        setup_file(array.cluster.setup)  # that it is there
    print(f"---- JOB{number}: what sbatch gets\n{text.rstrip()}\n----")
