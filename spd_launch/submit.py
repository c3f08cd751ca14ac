"""The only file that sends jobs: submitit builds the script, sbatch takes it.

One array per resource group, split where the cluster bounds arrays. All or nothing: what was sent
is cancelled when a later part fails.
"""

import io
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

from spd_launch import slurm_state, task
from spd_launch.compose import template_folders
from spd_launch.config import ClusterConfig
from spd_launch.errors import LaunchError, nearest
from spd_launch.ledger import LaunchDir, latest_jobs, note_jobs
from spd_launch.plan import Array, Task, group

# A rank that dies ends its peers, which would wait for it in a collective for ever.
SRUN = ["--kill-on-bad-exit=1", "--wait=60", "--open-mode=append", "--export=ALL"]


def submit(launch: LaunchDir, tasks: Sequence[Task], python_path: Path) -> dict[str, str]:
    """Send the tasks, targets first; returns run id -> job id.

    A decomposition starts when the job that trains its target has succeeded, and is cancelled by
    Slurm when that job has failed.

    Raises:
        LaunchError: Slurm refused; its own words, with nothing left in the queue.
    """
    for array in group(tasks):
        _copy_setup(launch, array.cluster)
    before = set(slurm_state.live_jobs(launch.launch_id))
    # When a launch is resumed, its targets may be done, or still in training.
    live = {run_id: job for run_id, job in latest_jobs(launch).items() if job in before}
    jobs: dict[str, str] = {}
    try:
        chunks = split(group(tasks), slurm_state.array_limit() if len(tasks) > 1 else 1)
        goals = Counter(chunk.tasks[0].config.launch.goal for chunk in chunks)
        with _outside_of_jobs():
            for chunk in chunks:
                first = chunk.tasks[0]
                after = (live | jobs).get(first.after) if first.after else None
                at_once = goals[first.config.launch.goal]
                sent = _send(launch, chunk, python_path, at_once, after)
                note_jobs(launch, "submit", sent)
                jobs |= sent
    except BaseException:
        slurm_state.cancel_jobs(sorted(set(slurm_state.live_jobs(launch.launch_id)) - before))
        raise
    return jobs


def split(arrays: Sequence[Array], limit: int) -> list[Array]:
    """Arrays of at most `limit` tasks: MaxArraySize bounds the index, which starts at 0 in each."""
    return [
        replace(array, tasks=array.tasks[start : start + limit])
        for array in arrays
        for start in range(0, len(array.tasks), limit)
    ]


def _send(
    launch: LaunchDir, array: Array, python_path: Path, n_arrays: int, after: str | None
) -> dict[str, str]:
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        executor = SlurmExecutor(launch.logs)
        executor.update_parameters(**job_parameters(launch, array, python_path, n_arrays, after))
        with redirect_stderr(io.StringIO()):  # submitit prints what it also raises
            sent = executor.map_array(
                task.run, [str(launch.path)] * len(array.tasks), [t.run_id for t in array.tasks]
            )
    except (FailedJobError, FailedSubmissionError) as error:
        raise LaunchError(_in_slurms_words(str(error), array.cluster)) from None
    return {t.run_id: job.job_id for t, job in zip(array.tasks, sent, strict=True)}


def job_parameters(
    launch: LaunchDir, array: Array, python_path: Path, n_arrays: int, after: str | None
) -> dict[str, Any]:
    """What submitit puts into the script; `after` is the job that must succeed first.

    The `n_arrays` arrays of one launch that may run at one time share `max_parallel` in equal
    parts, at least one task each.
    """
    cluster, per_node = array.cluster, array.tasks_per_node
    n = len(array.tasks)
    parallel = array.tasks[0].config.launch.max_parallel
    further = {k.replace("_", "-"): v for k, v in cluster.sbatch.items() if v is not False}
    if after is not None:
        both = filter(None, [f"afterok:{after}", further.get("dependency")])
        further |= {"dependency": ",".join(map(str, both)), "kill-on-invalid-dep": "yes"}
    asks_for_gpus = any(key.startswith(("gres", "gpus")) for key in further)
    return {
        "job_name": launch.launch_id,
        "comment": launch.launch_id,
        "wckey": None,  # submitit's default is refused where wckeys are enforced
        "nodes": array.nodes,
        "ntasks_per_node": per_node,
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
        "srun_args": [*SRUN, f"--cpus-per-task={cluster.cpus_per_task}"],
        "additional_parameters": {
            "requeue" if cluster.requeue == "on" else "no-requeue": True,
            **further,
        },
    }


def _setup_lines(launch: LaunchDir, cluster: ClusterConfig, python_path: Path) -> list[str]:
    environment = task.rank_environment(cluster, python_path)
    lines = ["umask 002"]
    if cluster.setup:
        lines.append(f"source {shlex.quote(str(_setup_copy(launch, cluster.setup)))} || exit 1")
    return lines + [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]


def _setup_copy(launch: LaunchDir, name: str) -> Path:
    return launch.path / "setup" / name


def _copy_setup(launch: LaunchDir, cluster: ClusterConfig) -> None:
    """Freeze the profile's shell file: later edits must not reach queued jobs."""
    if cluster.setup is None or _setup_copy(launch, cluster.setup).exists():
        return
    files = [folder / cluster.setup for folder in template_folders()]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        names = [str(f.relative_to(d)) for d in template_folders() for f in d.rglob("*.sh")]
        raise LaunchError(
            f"cluster.setup={cluster.setup}: no such file in slurm_templates/"
            f"{nearest(cluster.setup, names)}"
        )
    copy = _setup_copy(launch, cluster.setup)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(found.read_text())


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Drop what an enclosing job says about itself; sbatch would hand it to the new job.

    SLURM_CONF stays: it says which cluster.
    """
    inner = re.compile(r"SLURM_(?!CONF$)|SLURMD_|SRUN_|PMI|RANK$|WORLD_SIZE$|LOCAL_RANK$|MASTER_")
    removed = {key: os.environ.pop(key) for key in list(os.environ) if inner.match(key)}
    try:
        yield
    finally:
        os.environ.update(removed)


def _in_slurms_words(words: str, cluster: ClusterConfig) -> str:
    message = f"Slurm refused the job: {words.strip()}"
    if "partition" in words.lower():
        hint = nearest(str(cluster.partition), slurm_state.partitions())
        message += f"\n       cluster.partition={cluster.partition}{hint}"
    return message
