"""What a launch will do, decided before anything is done: PURE, no I/O.

One LaunchPlan holds every run of a multirun, and on Slurm every target that is not in the store
yet: a task of its own, which its decompositions come after. Tasks that ask for the same resources
and come after the same target share one job array. Names never depend on a place in an array, so
a resumed run keeps its own.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from spd_core.config import config_digest
from spd_core.targets.config import TransformerTargetConfig
from spd_core.targets.store import target_name
from spd_launch.config import ClusterConfig, JobConfig
from spd_launch.errors import LaunchError
from spd_launch.steps import Row

MAX_NAME = 100  # of a run, without the suffix
MAX_VALUE = 24


@dataclass(frozen=True)
class Task:
    """A whole job or one element of an array, with `nodes` x `tasks_per_node` ranks.

    `goal` is decomposition, target (the training of one), or the step that it is of those that
    follow the runs. `after` is the run id of the task that comes first: the one that puts the
    target of a decomposition into the store, or the run that a step looks at. A step's `run_id` is
    its name, and its config that of its run, or of the first run.
    """

    index: int
    run_id: str
    overrides: dict[str, str]
    config: JobConfig
    nodes: int
    tasks_per_node: int
    after: str | None
    goal: str


@dataclass(frozen=True)
class Array:
    """Tasks of one goal with one resource request, all after the same target."""

    cluster: ClusterConfig
    nodes: int
    tasks_per_node: int
    tasks: tuple[Task, ...]

    @property
    def pack(self) -> int:
        """How many tasks share one element: `launch.pack` runs, but targets and steps do not."""
        shared = self.tasks[0].goal == "decomposition"
        return min(self.tasks[0].config.launch.pack, len(self.tasks)) if shared else 1

    @property
    def elements(self) -> list[tuple[Task, ...]]:
        """The tasks of each element; the last one may have fewer."""
        starts = range(0, len(self.tasks), self.pack)
        return [self.tasks[start : start + self.pack] for start in starts]


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
        Task(i, run_id, overrides, config, *shape(config.cluster, config.dp), after, goal)
        for i, (run_id, overrides, config, after) in enumerate(named)
        for goal in [config.launch.goal]
    ]
    kinds = {config.cluster.kind for _, config in runs}
    if len(kinds) > 1:
        raise LaunchError("one launch runs either here or on Slurm: cluster=local must stand alone")
    overrides, first = runs[0]
    name = clean(first.launch.name or overrides.get("sweep") or first.experiment)[:MAX_NAME]
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
    for task in sorted(tasks, key=lambda t: t.goal == "decomposition"):
        digest = config_digest(task.config.cluster)
        key = (task.goal, digest, task.nodes, task.tasks_per_node, task.after)
        groups.setdefault(key, []).append(task)
    return tuple(
        Array(g[0].config.cluster, g[0].nodes, g[0].tasks_per_node, tuple(g))
        for g in groups.values()
    )


def in_words(tasks: Sequence[Task]) -> str:
    """How many targets, runs and steps these are."""
    n = Counter({"target": "target", "decomposition": "run"}.get(t.goal, "step") for t in tasks)
    parts = [f"{n[kind]} {kind}(s)" for kind in ("target", "run", "step") if n[kind]]
    return " and ".join(parts)


def step_tasks(rows: Sequence[Row], configs: Mapping[str, JobConfig]) -> list[Task]:
    """Steps as tasks of one process; `configs` has those of their runs, and first the first's."""
    return [
        Task(row.index, row.name, {}, config, 1, 1, row.after, row.goal)
        for row in rows
        for config in [configs[row.after or next(iter(configs))]]
    ]


def step_arrays(
    tasks: Sequence[Task],
    ends: Mapping[str | None, str],
    sent: Collection[str],
    needs: Literal["all", "any"],
) -> list[tuple[Array, str | None]]:
    """The tasks of one step as arrays, each with its dependency in Slurm's words.

    `ends` holds the job that each run's chain ends with so far (or several, as 7_0:7_1), by run
    id, and under None the last step of the whole launch; what is over is absent. Of these, `sent`
    are sent with this step. A step of a run waits for its run, element by element where those are
    an array (aftercorr); a step of the launch waits for all of them. Runs that share a job
    (`launch.pack`) fail apart, but their job fails with any: a step of a run comes after it however
    it ended, and looks itself whether its run has finished.
    """
    packed = bool(tasks) and tasks[0].config.launch.pack > 1
    word = {"all": "afterok", "any": "afterany"}[needs]
    last = [f"{word}:{ends[None]}"] if None in ends else []
    found: list[tuple[Array, list[str]]] = []
    groups: dict[tuple[str, str], list[Task]] = {}
    for task in tasks:
        array = ends.get(task.after, "").split("_")[0] if task.after is not None else ""
        groups.setdefault((array, config_digest(task.config.cluster)), []).append(task)
    for (array, _), members in groups.items():
        before = [ends[task.after] for task in members if task.after in ends]
        if members[0].after is None:
            ids = dict.fromkeys(job.split("_")[0] if job in sent else job for job in ends.values())
            found.append((_of_one_process(members), [f"{word}:{':'.join(ids)}"] if ids else []))
        elif not before:
            found.append((_of_one_process(members), last))
        elif not packed and before == [f"{array}_{i}" for i in range(len(members))]:
            found.append((_of_one_process(members), [f"aftercorr:{array}", *last]))
        else:
            after: dict[str, list[Task]] = {}
            for task, job in zip(members, before, strict=True):
                after.setdefault(job, []).append(task)
            own = "afterany" if packed else "afterok"
            found += [(_of_one_process(t), [f"{own}:{job}", *last]) for job, t in after.items()]
    return [(array, ",".join(dependency) or None) for array, dependency in found]


def _of_one_process(tasks: Sequence[Task]) -> Array:
    return Array(tasks[0].config.cluster, 1, 1, tuple(tasks))


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


def share(cluster: ClusterConfig, pack: int) -> ClusterConfig:
    """What each of `pack` runs has of the cores of one task: at least one of its own."""
    return cluster.model_copy(update={"cpus_per_task": max(1, cluster.cpus_per_task // pack)})


def run_ids(runs: Sequence[tuple[dict[str, str], JobConfig]], suffix: str) -> list[str]:
    """A name for each run: experiment, seed, what varies within the experiment, the suffix.

    Where names are long, or meet, a digest of the config takes the place of their end.

    Raises:
        LaunchError: two runs have the same config.
    """
    labels: dict[str, dict[str, str]] = {}
    for experiment in {config.experiment for _, config in runs}:
        labels[experiment] = _varying([o for o, c in runs if c.experiment == experiment])
    names = []
    for overrides, config in runs:
        varying = labels[config.experiment]
        parts = [config.experiment, f"seed{config.seed}"]
        parts += [label + _short(overrides[k]) for k, label in varying.items() if k in overrides]
        names.append(clean("-".join(parts)))
    digests = [config_digest(config) for _, config in runs]
    for (overrides, _), count in zip(runs, map(Counter(digests).get, digests), strict=True):
        if count != 1:
            shown = " ".join(f"{key}={value}" for key, value in overrides.items())
            raise LaunchError(f"{count} runs of this launch are the same: {shown}")
    counts = Counter(name.lower() for name in names)  # a file system may not see the difference
    return [
        f"{name}-{suffix}"
        if counts[name.lower()] == 1 and len(name) <= MAX_NAME
        else f"{name[: MAX_NAME - len(digest) - 1]}-{digest}-{suffix}"
        for name, digest in zip(names, digests, strict=True)
    ]


def _varying(all_overrides: Sequence[dict[str, str]]) -> dict[str, str]:
    """key -> the shortest ending that no other key has, for those not the same in all runs."""
    keys = dict.fromkeys(key for overrides in all_overrides for key in overrides)
    varying = {
        key: re.findall(r"[^.\[\]]+", key)
        for key in keys
        if key not in ("experiment", "seed") and len({o.get(key) for o in all_overrides}) > 1
    }
    labels = {}
    for key, path in varying.items():
        others = [other for other in varying.values() if other != path]
        n = next(n for n in range(1, len(path) + 2) if path[-n:] not in [o[-n:] for o in others])
        labels[key] = ".".join(path[-n:])
    return labels


def _short(value: str) -> str:
    """A value for a name: numbers join their key, words are set off, the longest become digests."""
    if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", value):
        text = value if len(value) < 10 else f"{float(value):.4g}"
        return re.sub(r"e(-?)\+?0*(?=\d)", r"e\1", text)
    word = clean(value.split("/")[-1])
    long = len(word) > MAX_VALUE
    return "_" + (hashlib.sha256(value.encode()).hexdigest()[:6] if long else word)


def clean(name: str) -> str:
    """A name that is safe in a shell, a file system and Slurm."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("-._") or "run"
