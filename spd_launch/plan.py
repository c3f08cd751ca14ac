"""What a launch will do, decided before anything is done: PURE, no I/O.

One LaunchPlan holds every run of a multirun, and on Slurm every target that is not in the store
yet: a task of its own, which its decompositions come after. Tasks that ask for the same resources
and come after the same target share one job array. Names never depend on a place in an array, so
a resumed run keeps its own.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from spd_core.config import config_digest
from spd_core.targets.config import TransformerTargetConfig
from spd_core.targets.store import target_name
from spd_launch.config import ClusterConfig, JobConfig
from spd_launch.errors import LaunchError

MAX_NAME = 100


@dataclass(frozen=True)
class Task:
    """One run: a whole job or one element of an array, with `nodes` x `tasks_per_node` ranks.

    `config.launch.goal` says whether it is a decomposition or the training of a target; `after` is
    the run id of the task that puts its target into the store first.
    """

    index: int
    run_id: str
    overrides: dict[str, str]
    config: JobConfig
    nodes: int
    tasks_per_node: int
    after: str | None


@dataclass(frozen=True)
class Array:
    """Tasks of one goal with one resource request, all after the same target."""

    cluster: ClusterConfig
    nodes: int
    tasks_per_node: int
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class LaunchPlan:
    launch_id: str
    arrays: tuple[Array, ...]

    @property
    def tasks(self) -> list[Task]:
        return sorted((t for array in self.arrays for t in array.tasks), key=lambda t: t.index)

    @property
    def cluster(self) -> ClusterConfig:
        return self.arrays[0].cluster


def make_plan(
    runs: Sequence[tuple[dict[str, str], JobConfig]],
    stamp: str,
    suffix: str,
    stored: Collection[str],
) -> LaunchPlan:
    """Plan runs (what the user typed, the config); `stamp` and `suffix` make the names unique.

    `stored` are the names of targets that need no training. Here, as opposed to on Slurm, a
    decomposition trains a missing target itself. Decompositions have the first indices.

    Raises:
        LaunchError: a dp that does not fit its profile, equal runs, local and Slurm mixed, or a
            target that cannot be trained as it is asked for.
    """
    targets = missing_targets(runs, stored)
    ids = {name: f"target-{run.target.kind}-{name}-{suffix}" for name, run in targets.items()}
    wanted = [run for run in runs if run[1].launch.goal == "decomposition"]
    named = [
        (run_id, overrides, config, ids.get(target_name(config)))
        for run_id, (overrides, config) in zip(run_ids(wanted, suffix), wanted, strict=True)
    ]
    named += [(ids[name], {}, config, None) for name, config in targets.items()]
    tasks = [
        Task(index, run_id, overrides, config, *shape(config.cluster, config.dp), after)
        for index, (run_id, overrides, config, after) in enumerate(named)
    ]
    kinds = {config.cluster.kind for _, config in runs}
    if len(kinds) > 1:
        raise LaunchError("one launch runs either here or on Slurm: cluster=local must stand alone")
    first = runs[0][1]
    name = clean(first.launch.name or first.experiment)
    return LaunchPlan(f"{stamp}-{name}-{suffix}", group(tasks))


def missing_targets(
    runs: Sequence[tuple[dict[str, str], JobConfig]], stored: Collection[str]
) -> dict[str, JobConfig]:
    """Name -> how the launch trains it first, with the resources of the first run that needs it."""
    targets: dict[str, JobConfig] = {}
    for _, config in runs:
        goal, name = config.launch.goal, target_name(config)
        if goal == "target" and config.target.kind == "custom":
            raise LaunchError("launch.goal=target: a custom target is loaded, never trained")
        first = goal == "target" or config.cluster.kind == "slurm"
        trained = config.target.kind != "custom" and config.target.from_run is None
        if first and trained and name not in stored:
            targets.setdefault(name, _target_run(config))
    return targets


def _target_run(config: JobConfig) -> JobConfig:
    """Language models are trained by as many processes as decompose them, toys by one."""
    launch = config.launch.model_copy(update={"goal": "target"})
    if not isinstance(config.target, TransformerTargetConfig):
        one = config.cluster.model_copy(update={"nodes": None})
        return config.model_copy(update={"launch": launch, "dp": 1, "cluster": one})
    if config.target.batch_size < config.dp:
        raise LaunchError(
            f"target.batch_size={config.target.batch_size} leaves some of dp={config.dp} "
            "processes empty, which train the target together"
        )
    return config.model_copy(update={"launch": launch})


def group(tasks: Sequence[Task]) -> tuple[Array, ...]:
    """Arrays, those of targets first; all tasks of a Slurm array share request and dependency."""
    groups: dict[tuple[str, str, int, int, str | None], list[Task]] = {}
    for task in sorted(tasks, key=lambda t: t.config.launch.goal == "decomposition"):
        goal, digest = task.config.launch.goal, config_digest(task.config.cluster)
        key = (goal, digest, task.nodes, task.tasks_per_node, task.after)
        groups.setdefault(key, []).append(task)
    return tuple(
        Array(g[0].config.cluster, g[0].nodes, g[0].tasks_per_node, tuple(g))
        for g in groups.values()
    )


def shape(cluster: ClusterConfig, dp: int) -> tuple[int, int]:
    """(nodes, tasks per node) of dp processes: part of one node, or whole nodes, or as asked."""
    full, nodes = cluster.gpus_per_node, cluster.nodes
    if nodes is not None:
        if dp % nodes == 0 and dp // nodes <= full:
            return nodes, dp // nodes
        valid = ", ".join(str(nodes * k) for k in dict.fromkeys([1, 2, full]) if k <= full)
        raise LaunchError(
            f"dp={dp} does not fit cluster.nodes={nodes} with up to cluster.gpus_per_node={full} "
            f"tasks each: dp is a multiple of {nodes} up to {nodes * full} ({valid}, ...)"
        )
    if dp <= full:
        return 1, dp
    if dp % full == 0 and cluster.kind == "slurm":
        return dp // full, full
    if cluster.kind == "local":
        raise LaunchError(f"dp={dp} is too many for this machine: 1 to {full} processes")
    raise LaunchError(
        f"dp={dp} does not fit cluster={cluster.name} with {full} tasks a node: valid are 1 to "
        f"{full}, or whole nodes: {dp // full * full}, {(dp // full + 1) * full}, ... "
        "(or give cluster.nodes and cluster.gpus_per_node)"
    )


def run_ids(runs: Sequence[tuple[dict[str, str], JobConfig]], suffix: str) -> list[str]:
    """A name for each run: experiment, seed, the overrides that vary, the launch's suffix."""
    names = []
    varying = _varying([overrides for overrides, _ in runs])
    for overrides, config in runs:
        parts = [config.experiment, f"seed{config.seed}"]
        parts += [f"{label}{overrides.get(key, '')}" for key, label in varying.items()]
        names.append(clean("-".join(parts)))
    # Cut or cleaned names may meet; equal configs must not.
    counts = Counter(names)
    digests = [config_digest(config)[:6] for _, config in runs]
    names = [n if counts[n] == 1 else f"{n}-{d}" for n, d in zip(names, digests, strict=True)]
    for name, count in Counter(names).items():
        if count > 1:
            raise LaunchError(f"{count} runs of this launch are the same: {name}")
    return [f"{name}-{suffix}" for name in names]


def _varying(all_overrides: Sequence[dict[str, str]]) -> dict[str, str]:
    """key -> short label, for the overrides that are not the same in all runs."""
    keys = dict.fromkeys(key for overrides in all_overrides for key in overrides)
    varying = [
        key
        for key in keys
        if key not in ("experiment", "seed") and len({o.get(key) for o in all_overrides}) > 1
    ]
    last = Counter(key.split(".")[-1] for key in varying)
    return {
        key: ".".join(key.split(".")[-1 if last[key.split(".")[-1]] == 1 else -2 :])
        for key in varying
    }


def clean(name: str) -> str:
    """A name that is safe in a shell, a file system and Slurm."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:MAX_NAME].strip("-._") or "run"
