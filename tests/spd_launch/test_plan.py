import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch_configs import STORED, config

from spd_core.targets.store import target_name
from spd_launch.compose import compose
from spd_launch.config import ClusterConfig, JobConfig
from spd_launch.errors import LaunchError
from spd_launch.freeze import describe
from spd_launch.plan import clean, group, make_plan, run_ids, shape
from spd_launch.submit import split
from spd_launch.validate import validate

CPU: ClusterConfig = config("cpu").cluster
WORDS = st.text("abz/ $'\"%.-0é\n", min_size=1, max_size=40)


@given(dp=st.integers(1, 200), full=st.integers(1, 16))
def test_shape_is_part_of_a_node_or_whole_nodes(dp: int, full: int) -> None:
    cluster = CPU.model_copy(update={"gpus_per_node": full})
    if dp > full and dp % full:
        with pytest.raises(LaunchError, match=f"dp={dp} does not fit"):
            shape(cluster, dp)
        return
    nodes, per_node = shape(cluster, dp)
    assert nodes * per_node == dp
    assert nodes == 1 or per_node == full


@given(nodes=st.integers(1, 8), full=st.integers(1, 8), dp=st.integers(1, 80))
def test_shape_with_nodes_given(nodes: int, full: int, dp: int) -> None:
    cluster = CPU.model_copy(update={"gpus_per_node": full, "nodes": nodes})
    if dp % nodes or dp > nodes * full:
        with pytest.raises(LaunchError, match="a multiple of"):
            shape(cluster, dp)
    else:
        assert shape(cluster, dp) == (nodes, dp // nodes)


@given(n=st.integers(1, 30), pack=st.integers(1, 9), limit=st.integers(1, 5))
def test_each_run_is_in_one_element_and_arrays_keep_their_limit(
    n: int, pack: int, limit: int
) -> None:
    runs = [({"seed": str(i)}, config(seed=i, launch__pack=pack)) for i in range(n)]
    arrays = split(make_plan(runs, "now", "ab12", STORED).arrays, limit)
    elements = [element for array in arrays for element in array.elements]
    assert [task.config.seed for element in elements for task in element] == [*range(n)]
    assert all(len(array.elements) <= limit for array in arrays)
    assert len(elements) == -(-n // pack) and max(map(len, elements)) == min(pack, n)


def test_targets_do_not_share_a_job() -> None:
    runs = [
        ({"target.seed": str(i)}, config(target__seed=i, launch__pack=4, launch__goal="target"))
        for i in range(3)
    ]
    [array] = make_plan(runs, "now", "ab12", []).arrays
    assert array.pack == 1 and len(array.elements) == 3


def test_16_gpus_are_two_nodes() -> None:
    assert shape(config("default").cluster, 16) == (2, 8)
    with pytest.raises(LaunchError, match="too many for this machine"):
        shape(config("local").cluster, 128)


@given(st.lists(WORDS, min_size=1, max_size=6, unique=True))
def test_run_ids_are_unique_and_safe(names: list[str]) -> None:
    runs = [({"track.wandb.project": n}, config(track__wandb__project=n)) for n in names]
    ids = run_ids(runs, "3fa9")
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*-3fa9", run_id) for run_id in ids)
    assert all(len(run_id) < 130 for run_id in ids)


def test_run_ids_show_what_varies() -> None:
    runs = [
        (
            {"experiment": "x", "seed": "0", "train.lr.start": v, "train.steps": "4"},
            config(train__lr__start=float(v)),
        )
        for v in ("1e-3", "3e-3")
    ]
    assert run_ids(runs, "ab12") == ["tms_5-2-seed0-start1e-3-ab12", "tms_5-2-seed0-start3e-3-ab12"]
    assert run_ids(runs[:1], "ab12") == ["tms_5-2-seed0-ab12"]


def test_run_ids_leave_out_what_is_the_same_and_tell_keys_apart() -> None:
    keys = ["losses.stochastic_recon.coeff", "losses.faithfulness.coeff", "train.lr.start"]
    rows = [("1", "0.5", "1e-05"), ("2e+30", "0.5", "0.0031622776"), ("2e+30", "0.7", "1e-05")]
    runs = [
        (
            {"experiment": "x", **dict(zip(keys, row, strict=True)), "train.steps": "4"},
            config(seed=i),
        )
        for i, row in enumerate(rows)
    ]
    assert run_ids(runs, "ab12") == [
        "tms_5-2-seed0-stochastic_recon.coeff1-faithfulness.coeff0.5-start1e-5-ab12",
        "tms_5-2-seed1-stochastic_recon.coeff2e30-faithfulness.coeff0.5-start0.003162-ab12",
        "tms_5-2-seed2-stochastic_recon.coeff2e30-faithfulness.coeff0.7-start1e-5-ab12",
    ]
    assert run_ids([(o | {keys[1]: "1"}, c) for o, c in runs], "ab12")[0] == (
        "tms_5-2-seed0-coeff1-start1e-5-ab12"
    )


def test_run_ids_of_words_parts_and_paths() -> None:
    values = [
        "leaky_hard",
        "/a/long/path/corpus.txt",
        "{linear1:5}",
        f"{{x:{'y' * 90}}}",
        "deleted",
    ]
    runs = [({"a.key": value}, config(seed=i)) for i, value in enumerate(values)]
    ends = [run_id.split("-key")[1] for run_id in run_ids(runs, "ab12")]
    assert ends[:3] == ["_leaky_hard-ab12", "_corpus.txt-ab12", "_linear1_5-ab12"]
    assert re.fullmatch("_[0-9a-f]{6}-ab12", ends[3]) and ends[4] == "_deleted-ab12"


def test_what_varies_between_experiments_alone_is_not_in_names() -> None:
    runs = [
        ({"train.steps": steps}, config(experiment=experiment, seed=seed))
        for experiment, steps in (("x", "10"), ("y", "20"))
        for seed in (0, 1)
    ]
    assert run_ids(runs, "ab12") == [f"{x}-seed{s}-ab12" for x in "xy" for s in (0, 1)]


NUMBERS = st.floats(1e-9, 1e9).map(str) | st.integers(0, 10**12).map(str)
KEYS = st.sampled_from(["a.coeff", "b.coeff", "c.b.coeff", "coeff", "m[h.*.coeff]", "q"])


@given(st.lists(st.dictionaries(KEYS, WORDS | NUMBERS, max_size=6), min_size=1, max_size=8))
def test_run_ids_are_unique_safe_and_bounded_whatever_is_set(rows: list[dict[str, str]]) -> None:
    runs = [(row, config(track__log_every=i + 1)) for i, row in enumerate(rows)]
    ids = run_ids(runs, "3fa9")
    assert len({run_id.lower() for run_id in ids}) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*-3fa9", run_id) for run_id in ids)
    assert all(len(run_id) <= 105 for run_id in ids)


def test_ids_do_not_depend_on_order() -> None:
    runs = [({"seed": str(seed)}, config(seed=seed)) for seed in range(4)]
    assert sorted(run_ids(runs, "ab12")) == sorted(run_ids(runs[::-1], "ab12"))


def test_equal_runs_are_refused() -> None:
    with pytest.raises(LaunchError, match="2 runs of this launch are the same: seed=0"):
        make_plan([({"seed": "0"}, config()), ({"seed": "0"}, config())], "now", "ab12", STORED)


def test_one_array_for_each_resource_request() -> None:
    sizes = [1, 2, 1, 16, 2, 1]
    runs = [({"seed": str(i), "dp": str(dp)}, config(seed=i, dp=dp)) for i, dp in enumerate(sizes)]
    plan = make_plan(runs, "20261123-112233", "3fa9", STORED)
    assert plan.launch_id == "20261123-112233-tms_5-2-3fa9"
    shapes = {(a.nodes, a.tasks_per_node): len(a.tasks) for a in plan.arrays}
    assert shapes == {(1, 1): 3, (1, 2): 2, (2, 8): 1}
    assert [task.index for task in plan.tasks] == list(range(6))
    assert describe(plan)["arrays"][0]["runs"] == [plan.tasks[i].run_id for i in (0, 2, 5)]


def lm(**changes: object) -> JobConfig:
    values = compose(["+experiment=ss_llama_simple-1L", "cluster=cpu"], multirun=False)[0].values
    return validate(values | changes)


def test_on_slurm_a_missing_target_is_a_task_that_its_runs_come_after() -> None:
    runs = [({"seed": str(seed)}, config(seed=seed, dp=16)) for seed in (0, 1)]
    plan = make_plan(runs, "now", "ab12", stored=[])
    [target, decompositions] = plan.arrays
    [task] = target.tasks
    assert task.run_id == f"target-tms-{STORED[0]}-ab12"
    assert (task.nodes, task.tasks_per_node, task.after) == (1, 1, None)
    assert (task.config.launch.goal, task.config.dp) == ("target", 1)
    assert target_name(task.config) == target_name(runs[0][1])
    assert [t.config for t in decompositions.tasks] == [run for _, run in runs]
    assert {t.after for t in decompositions.tasks} == {task.run_id}
    assert [t.index for t in (*decompositions.tasks, task)] == [0, 1, 2]


def test_targets_share_an_array_and_runs_wait_for_their_own_only() -> None:
    configs = [config(seed=s, target__seed=t) for s in (0, 1) for t in (0, 1, 2)]
    runs = [({"seed": str(i)}, c) for i, c in enumerate(configs)]
    plan = make_plan(runs, "now", "ab12", stored=STORED)  # that of target.seed=0
    assert [len(array.tasks) for array in plan.arrays] == [2, 2, 2, 2]
    for array in plan.arrays[1:]:
        assert len({t.after for t in array.tasks}) == 1
    for task in plan.tasks[:6]:
        digest = target_name(task.config)
        wanted = None if digest in STORED else f"target-tms-{digest}-ab12"
        assert task.after == wanted


def test_a_language_model_is_trained_by_as_many_processes_as_decompose_it() -> None:
    plan = make_plan([({}, lm(dp=16))], "now", "ab12", stored=[])
    target, run = plan.arrays
    assert (target.nodes, target.tasks_per_node) == (run.nodes, run.tasks_per_node) == (2, 8)
    small = {**lm().target.model_dump(), "batch_size": 8}
    with pytest.raises(LaunchError, match=r"target\.batch_size=8 leaves some of dp=16"):
        make_plan([({}, lm(dp=16, target=small))], "now", "ab12", stored=[])


def test_here_a_run_trains_its_own_target() -> None:
    [task] = make_plan([({}, config("local"))], "now", "ab12", stored=[]).tasks
    assert task.after is None and task.config.launch.goal == "decomposition"


@pytest.mark.parametrize("cluster", ["cpu", "local"])
def test_only_the_target(cluster: str) -> None:
    runs = [({}, config(cluster, seed=s, launch__goal="target")) for s in (0, 1)]
    [task] = make_plan(runs, "now", "ab12", stored=[]).tasks
    assert task.index == 0 and task.config.launch.goal == "target"
    assert make_plan(runs, "now", "ab12", stored=STORED).tasks == []


def test_a_custom_target_is_never_trained() -> None:
    custom = {"kind": "custom", "class_path": "torch.nn.Linear", "pretrained": None}
    custom |= {"n_features": 3, "output": None}
    [task] = make_plan([({}, config(target=custom))], "now", "ab12", stored=[]).tasks
    assert task.after is None
    with pytest.raises(LaunchError, match="a custom target is loaded, never trained"):
        make_plan([({}, config(target=custom, launch__goal="target"))], "now", "ab12", stored=[])


def test_local_and_slurm_do_not_mix() -> None:
    runs = [({"cluster": c}, config(c)) for c in ("cpu", "local")]
    with pytest.raises(LaunchError, match="either here or on Slurm"):
        make_plan(runs, "now", "ab12", STORED)


@given(n=st.integers(1, 30), limit=st.integers(1, 40))
def test_split_respects_the_array_limit(n: int, limit: int) -> None:
    plan = make_plan([({"seed": str(i)}, config(seed=i)) for i in range(n)], "now", "ab12", STORED)
    chunks = split(group(plan.tasks), limit)
    assert all(len(chunk.tasks) <= limit for chunk in chunks)
    assert [t.index for chunk in chunks for t in chunk.tasks] == list(range(n))


@given(WORDS)
def test_clean_is_safe(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", clean(name))
