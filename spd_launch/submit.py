"""The only file that sends jobs: submitit builds the script, sbatch takes it.

One array per resource group, split where the cluster bounds arrays. All or nothing: what was sent
is cancelled when a later part fails.
"""

import io
import os
import re
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

from spd_core.config import config_digest
from spd_launch import slurm_state, task, then
from spd_launch.compose import template_folders
from spd_launch.config import ClusterConfig
from spd_launch.errors import LaunchError, nearest
from spd_launch.ledger import LaunchDir, jobs_of_runs, note_jobs, read_rows
from spd_launch.local import term_is_interrupt
from spd_launch.plan import Array, Task, group, share, step_arrays
from spd_launch.steps import STEPS, Row

SRUN = ["--open-mode=append", "--export=ALL"]
# A rank that dies ends its peers, which would wait for it in a collective for ever.
RANKS_OF_ONE = ["--kill-on-bad-exit=1", "--wait=60"]
RUNS_APART = ["--kill-on-bad-exit=0", "--wait=0"]
# Of any line of the setup file, also of one that is not its last, such as a `module load`.
FAILED_SETUP = (
    'echo "cluster.setup: line $LINENO ended with code $?: '
    '$(sed -n "${LINENO}p" "$BASH_SOURCE")" >&2; exit 1'
)


def submit(launch: LaunchDir, tasks: Sequence[Task], python_path: Path) -> dict[str, str]:
    """Send the tasks: targets, then runs, then steps; returns run id -> job id.

    A decomposition starts when the job that trains its target has succeeded, and is cancelled by
    Slurm when that job has failed. So is a step, with the runs that it needs.

    Raises:
        LaunchError: Slurm refused; its own words, with nothing left in the queue.
    """
    for cluster in {config_digest(t.config.cluster): t.config.cluster for t in tasks}.values():
        _copy_setup(launch, cluster)
    before = set(slurm_state.live_jobs(launch.launch_id))
    # When a launch is resumed, its targets and other runs may be done, or still at work.
    jobs = jobs_of_runs(launch).items()
    live = {run_id: job for run_id, given in jobs for job in reversed(given) if job in before}
    limit = slurm_state.array_limit() if len(tasks) > 1 else 1

    def send(array: Array, n_arrays: int, dependency: str | None) -> dict[str, str]:
        with _uninterrupted():
            return _send(launch, array, python_path, n_arrays, dependency)

    with term_is_interrupt(), _outside_of_jobs():
        try:
            return send_all(tasks, read_rows(launch), limit, live, send)
        except BaseException as error:
            _take_back(launch, before, error)
            raise


def _take_back(launch: LaunchDir, before: set[str], error: BaseException) -> None:
    """Cancel what a launch that was refused or interrupted had sent already, and say so."""
    again = f"python -m spd_launch.cancel {launch.launch_id}"
    try:
        sent = sorted(set(slurm_state.live_jobs(launch.launch_id)) - before)
        slurm_state.cancel_jobs(sent)
    except LaunchError as problem:
        raise LaunchError(
            f"{str(error) or 'interrupted'}\n       What was sent before could not be cancelled: "
            f"{problem}\n       When Slurm answers again: {again}"
        ) from None
    if sent:
        print(f"not sent whole: the {len(sent)} job(s) sent before are cancelled", file=sys.stderr)


def send_all(
    tasks: Sequence[Task],
    rows: Sequence[Row],
    limit: int,
    live: dict[str, str],
    send: Callable[[Array, int, str | None], dict[str, str]],
) -> dict[str, str]:
    """Call `send` for array after array: targets, runs, then the steps in their order.

    `send` takes an array of at most `limit` tasks, how many arrays share `max_parallel`, and the
    dependency in Slurm's words; it returns run id -> job id, and so does this for all of them.
    `rows` are all of the launch, `live` the jobs that were sent before and are not over.
    """
    jobs: dict[str, str] = {}
    chunks = split(group([task for task in tasks if task.goal not in STEPS]), limit)
    goals = Counter(chunk.tasks[0].goal for chunk in chunks)
    for chunk in chunks:
        first = chunk.tasks[0]
        after = (live | jobs).get(first.after) if first.after else None
        jobs |= send(chunk, goals[first.goal], None if after is None else f"afterok:{after}")

    names = {row.name for row in rows if row.goal == "decomposition"}
    # What every run's chain ends with so far, and (None) the last step of the whole launch.
    ends: dict[str | None, str] = {n: job for n, job in (live | jobs).items() if n in names}
    options = tasks[0].config.launch
    for step in options.then:
        mine = [task for task in tasks if task.goal == step]
        for array, dependency in step_arrays(mine, ends, jobs.values(), options.then_needs):
            for chunk in split([array], limit):
                jobs |= send(chunk, 1, dependency)
        last: dict[str | None, list[str]] = {}  # of a step in parts, all of them
        for row in rows:
            if row.goal == step and row.name in live | jobs:
                last.setdefault(row.after, []).append((live | jobs)[row.name])
        ends |= {run: ":".join(ids) for run, ids in last.items()}
    return jobs


def split(arrays: Sequence[Array], limit: int) -> list[Array]:
    """At most `limit` elements each: MaxArraySize bounds the index, which starts at 0 in each."""
    return [
        replace(array, tasks=array.tasks[start : start + limit * array.pack])
        for array in arrays
        for start in range(0, len(array.tasks), limit * array.pack)
    ]


def _send(
    launch: LaunchDir, array: Array, python_path: Path, n_arrays: int, dependency: str | None
) -> dict[str, str]:
    """Send one array, and note its jobs."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        executor = SlurmExecutor(launch.logs)
        executor.update_parameters(
            **job_parameters(launch, array, python_path, n_arrays, dependency)
        )
        ids = [[t.run_id for t in element] for element in array.elements]
        with redirect_stderr(io.StringIO()):  # submitit prints what it also raises
            paths = [str(launch.path)] * len(ids)
            if array.pack > 1:
                sent = executor.map_array(task.run_one_of, paths, ids)
            else:
                function = then.run if array.tasks[0].goal in STEPS else task.run
                sent = executor.map_array(function, paths, [name for [name] in ids])
    except (FailedJobError, FailedSubmissionError) as error:
        raise LaunchError(_in_slurms_words(str(error), array.cluster)) from None
    jobs = {name: job.job_id for of_one, job in zip(ids, sent, strict=True) for name in of_one}
    note_jobs(launch, "submit", jobs)
    return jobs


def script(
    launch: LaunchDir, array: Array, python_path: Path, n_arrays: int, dependency: str | None
) -> str:
    """The script that `_send` would hand to sbatch, written by submitit, also without a Slurm."""
    from submitit import SlurmExecutor

    class Writer(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1

    writer = Writer(launch.logs)
    writer.update_parameters(**job_parameters(launch, array, python_path, n_arrays, dependency))
    if len(array.elements) > 1:
        writer.parameters["map_count"] = len(array.elements)
    return writer._make_submission_file_text(writer._submitit_command_str, "")


def job_parameters(
    launch: LaunchDir, array: Array, python_path: Path, n_arrays: int, dependency: str | None
) -> dict[str, Any]:
    """What submitit puts into the script; `dependency` in Slurm's words, such as afterok:12_3.

    The `n_arrays` arrays of one launch that may run at one time share `max_parallel` in equal
    parts, at least one task each. `launch.pack` runs are srun's tasks on the one node of theirs.
    """
    cluster, per_node, pack = share(array.cluster, array.pack), array.tasks_per_node, array.pack
    n, of_tasks = len(array.elements), RUNS_APART if pack > 1 else RANKS_OF_ONE
    parallel = array.tasks[0].config.launch.max_parallel
    further = {k.replace("_", "-"): v for k, v in cluster.sbatch.items() if v is not False}
    if dependency is not None:
        both = filter(None, [dependency, further.get("dependency")])
        further |= {"dependency": ",".join(map(str, both)), "kill-on-invalid-dep": "yes"}
    asks_for_gpus = any(key.startswith(("gres", "gpus")) for key in further)
    return {
        "job_name": launch.launch_id,
        "comment": launch.launch_id,
        "wckey": None,  # submitit's default is refused where wckeys are enforced
        "nodes": array.nodes,
        "ntasks_per_node": per_node * pack,
        "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": per_node if cluster.device == "gpu" and not asks_for_gpus else None,
        "mem": f"{int(cluster.mem_per_task_gb * per_node * 1024)}M"
        if cluster.mem_per_task_gb
        else None,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time_min,
        "signal_delay_s": cluster.signal_delay_s,
        "array_parallelism": max(1, parallel // n_arrays) if parallel else n,
        "stderr_to_stdout": True,
        "setup": _setup_lines(launch, cluster, python_path),
        # srun does not inherit --cpus-per-task (Slurm >= 22.05)
        "srun_args": [*SRUN, *of_tasks, f"--cpus-per-task={cluster.cpus_per_task}"],
        "additional_parameters": {
            "requeue" if cluster.requeue == "on" else "no-requeue": True,
            **further,
        },
    }


def _setup_lines(launch: LaunchDir, cluster: ClusterConfig, python_path: Path) -> list[str]:
    environment = task.rank_environment(cluster, python_path)
    lines = ["umask 002"]
    if cluster.setup:
        source = f"source {shlex.quote(str(_setup_copy(launch, cluster.setup)))}"
        lines += [f"trap '{FAILED_SETUP}' ERR", source, "trap - ERR"]
    return lines + [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]


def _setup_copy(launch: LaunchDir, name: str) -> Path:
    return launch.path / "setup" / name


def _copy_setup(launch: LaunchDir, cluster: ClusterConfig) -> None:
    """Freeze the profile's shell file: later edits must not reach queued jobs."""
    if cluster.setup is None or _setup_copy(launch, cluster.setup).exists():
        return
    found = setup_file(cluster.setup)
    copy = _setup_copy(launch, cluster.setup)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(found.read_text())


def setup_file(name: str) -> Path:
    """The shell file of slurm_templates/ that `cluster.setup` names."""
    files = [folder / name for folder in template_folders()]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        names = [str(f.relative_to(d)) for d in template_folders() for f in d.rglob("*.sh")]
        raise LaunchError(
            f"cluster.setup={name}: no such file in slurm_templates/{nearest(name, names)}"
        )
    return found


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Drop what an enclosing job says about itself; sbatch would hand it to the new job.

    And SBATCH_..., by which sbatch overrides the lines of a script: the profile decides.
    SLURM_CONF stays: it says which cluster.
    """
    inner = re.compile(
        r"SLURM_(?!CONF$)|SLURMD_|SBATCH_|SRUN_|PMI|RANK$|WORLD_SIZE$|LOCAL_RANK$|MASTER_"
    )
    removed = {key: os.environ.pop(key) for key in list(os.environ) if inner.match(key)}
    try:
        yield
    finally:
        os.environ.update(removed)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold an interruption back until sbatch has answered; sbatch itself inherits the mask.

    What sbatch has asked for may become a job after `_take_back` has looked for what to cancel.
    """
    numbers, held = (signal.SIGINT, signal.SIGTERM), list[int]()
    handlers = [signal.signal(number, lambda number, _: held.append(number)) for number in numbers]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # of this thread, but there are others
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


def _in_slurms_words(words: str, cluster: ClusterConfig) -> str:
    message = f"Slurm refused the job: {words.strip()}"
    if "partition" in words.lower():
        hint = nearest(str(cluster.partition), slurm_state.partitions())
        message += f"\n       cluster.partition={cluster.partition}{hint}"
    return message
