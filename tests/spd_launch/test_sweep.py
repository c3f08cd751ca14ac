"""Sweep files, from the text to composed and valid runs."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spd_launch.compose import compose, sweep_names
from spd_launch.errors import LaunchError
from spd_launch.plan import run_ids
from spd_launch.sweep import Sweep, expand
from spd_launch.validate import validate_all

ROOT = Path(__file__).parent.parent.parent
SHIPPED = {"tms_sparsity": 30, "recon_losses": 30, "subcomponents": 7, "stories_batch": 6}


def values_of(file_text: dict) -> list[dict]:
    runs = expand(Sweep.model_validate(file_text), "test")
    return [{key: setting.value for key, setting in run.items()} for run in runs]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes sweeps/mine.yaml into the current directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> None:
        (tmp_path / "sweeps").mkdir(exist_ok=True)
        (tmp_path / "sweeps" / "mine.yaml").write_text(text)

    return write


def configs(*arguments: str, multirun: bool = False):
    return [config for _, config in validate_all(compose([*arguments, "cluster=cpu"], multirun))]


@pytest.mark.parametrize("name", sweep_names())
def test_every_shipped_sweep_is_valid_and_says_what_it_asks(name: str) -> None:
    text = (ROOT / "sweeps" / f"{name}.yaml").read_text()
    question = text.partition("global:")[0]
    assert question.startswith("# ") and "?" in question
    runs = validate_all(compose([f"+sweep={name}", "cluster=cpu"], multirun=False))
    assert len(runs) == SHIPPED[name] if name in SHIPPED else 30 < len(runs) <= 40
    ids = run_ids(runs, "ab12")
    assert len(set(ids)) == len(runs) and all(len(i) <= 105 for i in ids)


def test_a_grid_is_every_combination() -> None:
    seeds, steps = [0, 1, 2], [10, 20]
    runs = values_of({"global": {"grid": {"seed": seeds, "train.steps": steps}}})
    expected = [{"seed": s, "train.steps": n} for s, n in itertools.product(seeds, steps)]
    assert runs == expected


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_zips_and_draws_move_together_and_multiply(n: int, m: int, draws: int) -> None:
    uniform = {"kind": "uniform", "low": 0, "high": 1}
    runs = values_of({"global": {
        "set": {"e": "same"},
        "zip": [{"a": list(range(n)), "b": list(range(n))}, {"c": list(range(m))}],
        "random": {"n": draws, "seed": 0, "keys": {"x": uniform, "y": uniform}},
    }})  # fmt: skip
    assert len(runs) == n * m * draws
    assert all(run["a"] == run["b"] and run["e"] == "same" for run in runs)
    assert {(run["a"], run["c"]) for run in runs} == {(i, j) for i in range(n) for j in range(m)}
    assert len({(run["x"], run["y"]) for run in runs}) == len({run["x"] for run in runs}) == draws


def drawn(n: int, seed: int, **keys: dict) -> list[dict]:
    return values_of({"global": {"random": {"n": n, "seed": seed, "keys": keys}}})


def test_draws_are_of_their_kind() -> None:
    runs = drawn(
        400, 0,
        u={"kind": "uniform", "low": 2, "high": 4},
        l={"kind": "log_uniform", "low": 1e-4, "high": 1},
        i={"kind": "int", "low": 1, "high": 3}, c={"kind": "choice", "values": ["a", "b"]},
    )  # fmt: skip
    assert all(2 <= run["u"] <= 4 and 1e-4 <= run["l"] <= 1 for run in runs)
    assert {run["i"] for run in runs} == {1, 2, 3} and {run["c"] for run in runs} == {"a", "b"}
    for decade in range(4):  # 100 are expected, with a standard deviation of 9
        assert 60 < sum(10 ** (decade - 4) <= run["l"] < 10 ** (decade - 3) for run in runs) < 140
    assert 2.9 < sum(run["u"] for run in runs) / 400 < 3.1


def test_draws_stay_when_more_are_made() -> None:
    interval = {"kind": "log_uniform", "low": 1e-4, "high": 1e-2}
    five = drawn(5, 7, lr=interval)
    assert drawn(9, 7, lr=interval)[:5] == five != drawn(5, 8, lr=interval)
    both = drawn(5, 7, other=interval, lr=interval)
    assert [run["lr"] for run in both] == [run["lr"] for run in five]
    assert [run["other"] for run in both] != [run["lr"] for run in five]


def test_conditions_drop_runs() -> None:
    grid = {"a": [1, 2, 3], "b": [1, 2, 3]}
    runs = values_of({"global": {"grid": grid, "where": ["a < b", "a + b != 5"]}})
    assert [(run["a"], run["b"]) for run in runs] == [(1, 2), (1, 3)]
    with pytest.raises(LaunchError, match="test: global: no run meets where: a > b and b > a"):
        values_of({"global": {"grid": grid, "where": ["a > b", "b > a"]}})
    with pytest.raises(LaunchError, match="test: global: where: d > 1: d is no key"):
        values_of({"global": {"grid": grid, "where": ["d > 1"]}})


def test_an_experiment_replaces_what_global_says_of_a_key() -> None:
    runs = values_of({
        "global": {"grid": {"seed": [0, 1], "train.steps": [10, 20]}},
        "experiments": {"x": None, "y": {"set": {"train.steps": 5}}, "z": {"where": ["seed == 1"]}},
    })  # fmt: skip
    found = [(run["experiment"], run["seed"], run["train.steps"]) for run in runs]
    x = [("x", seed, steps) for seed in (0, 1) for steps in (10, 20)]
    assert found == [*x, ("y", 0, 5), ("y", 1, 5), ("z", 1, 10), ("z", 1, 20)]


def test_whole_parts_of_the_config_are_values(sweep) -> None:
    sweep("""
global:
  set: {data.value_range: zero_to_one}
  grid:
    losses:
      stochastic: {}
      pgd:
        stochastic_recon: null
        pgd_recon: {coeff: 1e-1, init: ones, step_size: 1, n_steps: 3, scope: shared_across_batch}
    decompose.modules[layers.*.mlp_in]: [10, 20]
experiments:
  resid_mlp1:
""")
    runs = compose(["+sweep=mine", "cluster=cpu"], multirun=False)
    assert [run.overrides["losses"] for run in runs] == ["stochastic", "stochastic", "pgd", "pgd"]
    found = [config for _, config in validate_all(runs)]
    assert [config.decompose.modules["layers.*.mlp_in"] for config in found] == [10, 20, 10, 20]
    assert all(config.decompose.modules["layers.*.mlp_out"] == 100 for config in found)
    first, last = found[0].losses, found[3].losses
    assert first.stochastic_recon is not None and first.pgd_recon is None
    assert last.stochastic_recon is None and last.pgd_recon is not None
    assert last.pgd_recon.coeff == 0.1 and last.pgd_recon.n_steps == 3
    assert last.importance_minimality == first.importance_minimality
    names = run_ids([(run.overrides, c) for run, c in zip(runs, found, strict=True)], "ab12")
    assert names[3] == "resid_mlp1-seed0-losses_pgd-mlp_in20-ab12"


def test_files_of_a_group_and_references_are_values(sweep) -> None:
    sweep("""
global:
  set: {size: small, eval.every: "${train.steps}", eval.slow_every: "${train.steps}"}
  grid: {data: [stories, simple_stories], train.steps: [40, 60]}
experiments: {ss_llama_simple-1L: }
""")
    found = configs("+sweep=mine")
    text = [(config.data.source, config.eval.slow_every) for config in found]  # type: ignore[union-attr]
    assert text == [("stories", 40), ("stories", 60), ("hub", 40), ("hub", 60)]


FILE = """
global: {grid: {seed: [0, 1]}}
experiments: {tms_5-2: {set: {train.steps: 5}}, resid_mlp1: }
"""


def test_the_command_line_goes_on_top(sweep) -> None:
    sweep(FILE)
    assert [config.seed for config in configs("+sweep=mine")] == [0, 1, 0, 1]
    [one] = configs("sweep=mine", "experiment=tms_5-2", "seed=7")
    assert (one.seed, one.train.steps, one.experiment) == (7, 5, "tms_5-2")
    found = configs("+sweep=mine", "dp=1,2", "train.steps=9", multirun=True)
    assert [(c.seed, c.dp) for c in found] == [(s, dp) for s in (0, 1, 0, 1) for dp in (1, 2)]
    assert {config.train.steps for config in found} == {9}


def test_a_sweep_without_experiments_is_for_any(sweep) -> None:
    sweep("global: {grid: {seed: [3, 4]}}")
    names = ["tms_5-2", "tms_5-2-id"]
    found = configs("+sweep=mine", f"experiment={','.join(names)}", multirun=True)
    assert [(c.seed, c.experiment) for c in found] == [(s, name) for s in (3, 4) for name in names]
    with pytest.raises(LaunchError, match="choose an experiment"):
        configs("+sweep=mine")


def test_the_example_of_the_manual_is_valid(sweep) -> None:
    manual = (ROOT / "docs" / "sweeps.md").read_text()
    sweep(manual.split("```yaml\n")[1].split("```")[0])
    found = configs("+sweep=mine")
    # Seeds x (coefficients x pairs, of which `where` drops one) x draws; then one coefficient.
    names = [config.experiment for config in found]
    assert names == ["tms_5-2"] * 3 * 3 * 20 + ["tms_5-2-id"] * 3 * 2 * 20
    pairs = {(c.train.batch_size, c.train.lr.start) for c in found}
    assert pairs == {(1024, 1e-3), (4096, 2e-3)}
    assert {c.eval.slow_every for c in found} == {5000}


def test_the_current_directorys_sweeps_come_first(tmp_path: Path, sweep) -> None:
    sweep(FILE)
    (tmp_path / "sweeps" / "mine.yaml").rename(tmp_path / "sweeps" / "tms_sparsity.yaml")
    assert len(configs("+sweep=tms_sparsity")) == 4
    assert len(configs("+sweep=subcomponents")) == 7


BAD = [
    ("global: {gird: {seed: [0]}}", "no field 'gird' in global; did you mean grid"),
    ("globl: {}", "no field 'globl' at the top level; did you mean global"),
    ("experiments: {tms_5-2: {random: {n: 0, seed: 0, keys: {a: {kind: int, low: 0, high: 1}}}}}",
     r"experiments\.tms_5-2\.random\.n=0: .*greater than or equal to 1"),
    ("global: {random: {n: 1, seed: 0, keys: {a: {kind: log_uniform, low: 0, high: 1}}}}",
     r"global\.random\.keys\.a\.low=0: .*greater than 0"),
    ("global: {random: {n: 1, seed: 0, keys: {a: {kind: uniform, low: 3, high: 1}}}}",
     "low=3 is not below high=1"),
    ("global: {random: {n: 1, seed: 0, keys: {a: {kind: int, low: 3, high: 3}}}}",
     "low=3 is not below high=3"),
    ("global: {random: {n: 1, seed: 0, keys: {a: {kind: uniform, low: 3, hihg: 4}}}}",
     "no field 'hihg' .*did you mean high"),
    ("global: {grid: {seed: 3}}", r"global\.grid\.seed=3: .*valid list"),
    ("global: {grid: {seed: []}}", r"global\.grid\.seed=\[\]: .*at least 1"),
    ("global: {zip: [{seed: [1, 2], dp: [1]}]}", "move together, but seed has 2, dp has 1"),
    ("global: {grid: {seed: [1]}, set: {seed: 2}}", "seed stands in two of"),
    ("global: {where: [seed < 3]}\nexperiments: {tms_5-2: }", "where: seed < 3: seed is no key"),
    ("global: [", "cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message for _, message in BAD])
def test_a_wrong_file_is_named_with_its_key(sweep, text: str, message: str) -> None:
    sweep(text)
    with pytest.raises(LaunchError, match=f"(?s)sweeps/mine.yaml.*{message}"):
        configs("+sweep=mine", "+experiment=tms_5-2")


def test_what_a_sweep_cannot_set_is_named_with_its_run(sweep) -> None:
    sweep("global: {set: {train.stepz: 3}, grid: {seed: [0, 1]}}\nexperiments: {tms_5-2: }")
    with pytest.raises(LaunchError) as error:
        configs("+sweep=mine")
    message = str(error.value)
    assert "2 of 2 runs cannot be, so none was sent" in message
    assert "\n       seed=0 sweep=mine experiment=tms_5-2 train.stepz=3 cluster=cpu\n" in message
    assert "no field 'stepz' in train; did you mean steps" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+sweep=tms_sparsty"], "no sweep named 'tms_sparsty'; did you mean tms_sparsity"),
        (["+sweep=tms_sparsity", "+experiment=tms"], "no experiment 'tms'; did you mean tms_5-2"),
        (["+sweep=tms_sparsity", "seed=0,1"], "add -m"),
    ],
)  # fmt: skip
def test_wrong_words_about_sweeps(arguments: list[str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        configs(*arguments)
    with pytest.raises(LaunchError, match="one sweep at a time"):
        configs("+sweep=a,b", multirun=True)
