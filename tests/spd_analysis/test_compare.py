import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file

from spd_analysis.compare import (
    Settings,
    Subcomponents,
    activation_densities,
    compare_runs,
    cosines,
    main,
    print_summary,
    similarity,
)
from spd_core.config import load_config
from spd_core.data.batches import Decomposition, evaluation_batch
from spd_core.load import load_run
from spd_core.run_dir import RunDir
from spd_core.targets.store import target_folder
from spd_launch.config import config_to_yaml

ALL = Settings(importance=0.0, density=-1.0, n_batches=1)  # everything counts as alive


def subcomponents(seed, C, d_in=5, d_out=4):
    g = torch.Generator().manual_seed(seed)
    V, U = torch.randn(d_in, C, generator=g), torch.randn(C, d_out, generator=g)
    return Subcomponents(V, U)


def by_hand(first, second):
    """Absolute cosines between the rank-one matrices themselves, flattened, in double."""

    def flat(of):
        V, U = of.V.double().numpy(), of.U.double().numpy()
        return [np.outer(V[:, c], U[c]).ravel() for c in range(V.shape[1])]

    return np.array([
        [abs(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)) for b in flat(second)]
        for a in flat(first)
    ])  # fmt: skip


seeds, sizes = st.integers(0, 2**31), st.integers(1, 5)


@given(seeds, sizes, sizes)
def test_cosines_are_those_of_the_rank_one_matrices(seed, C1, C2):
    first, second = subcomponents(seed, C1), subcomponents(seed + 1, C2)
    np.testing.assert_allclose(cosines(first, second), by_hand(first, second), atol=1e-6)


@given(seeds, sizes, sizes)
def test_best_counterparts_and_the_best_of_all_matchings(seed, C1, C2):
    first, second = subcomponents(seed, C1), subcomponents(seed + 1, C2)
    table, found = by_hand(first, second), similarity(first, second)
    assert found.to_second == pytest.approx(np.mean([max(row) for row in table]), abs=1e-5)
    assert found.to_first == pytest.approx(np.mean([max(col) for col in table.T]), abs=1e-5)
    n = min(C1, C2)
    best = max(
        np.mean([table[i, j] for i, j in zip(rows, columns, strict=True)])
        for rows in itertools.combinations(range(C1), n)
        for columns in itertools.permutations(range(C2), n)
    )
    assert found.matched == pytest.approx(best, abs=1e-5)
    assert np.mean([table[i, j] for i, j in found.pairs]) == pytest.approx(best, abs=1e-5)


@given(seeds, st.integers(1, 20), st.data())
def test_order_sign_and_length_mean_nothing(seed, C, data):
    first = subcomponents(seed, C)
    order = data.draw(st.permutations(range(C)))
    lengths = st.lists(st.floats(1e-20, 1e15), min_size=C, max_size=C)
    signs = st.lists(st.sampled_from([-1.0, 1.0]), min_size=C, max_size=C)
    v, u = (
        torch.tensor(data.draw(lengths)) * torch.tensor(data.draw(signs), dtype=torch.float32)
        for _ in range(2)
    )
    second = Subcomponents(first.V[:, order] * v, first.U[order] * u[:, None])
    found = similarity(first, second)
    for value in (found.to_second, found.to_first, found.matched):
        assert value == pytest.approx(1, abs=1e-5)
    assert [j for _, j in sorted((order[j], j) for j in range(C))] == [j for _, j in found.pairs]


@given(seeds, sizes, sizes)
def test_the_other_way_round_the_directions_change_places(seed, C1, C2):
    first, second = subcomponents(seed, C1), subcomponents(seed + 1, C2)
    there, back = similarity(first, second), similarity(second, first)
    assert (there.to_second, there.to_first) == pytest.approx((back.to_first, back.to_second))
    assert there.matched == pytest.approx(back.matched)


def test_one_that_is_zero_is_like_no_other():
    first = subcomponents(0, 3)
    first.V[:, 1] = 0
    assert cosines(first, first).diagonal().tolist() == pytest.approx([1, 0, 1])


def test_none_alive_is_no_number():
    found = similarity(subcomponents(0, 3), subcomponents(1, 0))
    assert (found.to_second, found.to_first, found.matched, found.pairs) == (None,) * 3 + ([],)


# ---------------------------------------------------------------- runs


def edit_weights(run_dir, change):
    """Change the tensors of the newest checkpoint, and renew its digest."""
    import hashlib

    folder = run_dir.checkpoints / "step_6"
    tensors = load_file(folder / "state.safetensors")
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "state.safetensors")
    digest = hashlib.sha256((folder / "state.safetensors").read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps({"step": 6, "sha256": digest}))


def copy_of(run_dir, name):
    shutil.copytree(run_dir.path, run_dir.path.with_name(name))
    return RunDir(run_dir.path.with_name(name))


def test_a_run_against_itself_disguised_and_against_another(trained, one_process):
    apart = "decompose.start=random"
    one, other = trained("one", apart), trained("other", apart, "seed=1")
    disguised, order = copy_of(one, "disguised"), [3, 0, 5, 1, 4, 2]

    def disguise(tensors):
        for module in ("linear1", "linear2"):
            V, U = (f"model:components.{module}.{part}" for part in "VU")
            tensors[V], tensors[U] = -2 * tensors[V][:, order], tensors[U][order] * 0.1

    edit_weights(disguised, disguise)
    summary = compare_runs([one, disguised, other], ALL, one_process)
    assert summary["runs"] == ["one", "disguised", "other"]
    for key in ("to_column", "matched"):
        matrix = np.array(summary[key])
        np.testing.assert_allclose(matrix[:2, :2], 1, atol=1e-5)
        np.testing.assert_allclose(matrix.diagonal(), 1, atol=1e-5)
        np.testing.assert_allclose(matrix[0], matrix[1], atol=1e-5)
        assert (matrix[2, :2] < 0.99).all()
    # Each module counts the same, and rows look for their counterparts in columns.
    tables = []
    for module in ("linear1", "linear2"):
        a, b = (load_run(r.path).model.components[module] for r in (one, other))
        tables.append(by_hand(Subcomponents(a.V.detach(), a.U.detach()),
                              Subcomponents(b.V.detach(), b.U.detach())))  # fmt: skip
    means = [np.mean([t.max(axis).mean() for t in tables]) for axis in (1, 0)]
    assert (summary["to_column"][0][2], summary["to_column"][2][0]) == pytest.approx(means)


def test_densities_count_positions_above_the_threshold(trained, one_process):
    run_dir = trained("one")
    run = load_run(run_dir.path)
    densities = activation_densities(run, run_dir.data, 2, 0.3, one_process)
    d = Decomposition(run.config, run.model, one_process, run_dir.data)
    for module, density in densities.items():
        seen = torch.cat(
            [evaluation_batch(d, i, "eval").ci[module].lower.detach() for i in range(2)]
        )
        assert seen.shape == (64, 6)
        torch.testing.assert_close(density, (seen > 0.3).double().mean(0))


def test_what_is_not_alive_is_left_out(trained, one_process):
    one, other = trained("one"), trained("other", "seed=1")
    densities = activation_densities(load_run(one.path), one.data, 2, 0.0, one_process)
    density = densities["linear1"].sort().values[2].item()
    summary = compare_runs([one, other], Settings(0.0, density, 2), one_process)
    alive = [int((d > density).sum()) for d in densities.values()]
    assert [summary["alive"][m][0] for m in ("linear1", "linear2")] == alive and alive[0] < 6


def test_none_alive_is_said(trained, one_process, capsys):
    one, other = trained("one"), trained("other", "seed=1")
    summary = compare_runs([one, other], Settings(0.0, 1.0, 1), one_process)
    assert summary["to_column"] == summary["matched"] == [[None, None], [None, None]]
    print_summary(summary, Console(width=100))
    assert capsys.readouterr().out.count("none alive") == 4


def test_modules_that_not_all_have_are_left_out_and_said(trained, one_process, capsys):
    one = trained("one", "decompose.tied=[]")
    only = ("decompose.tied=[]", "decompose.modules.linear1=null", "eval.metrics.mmcs_ml2r=null",
            "eval.metrics.identity_ci_error=null")  # fmt: skip
    other = trained("other", *only)
    summary = compare_runs([one, other], ALL, one_process)
    assert (list(summary["modules"]), summary["left_out"]) == (["linear2"], ["linear1"])
    print_summary(summary, Console(width=100))
    assert "left out" in capsys.readouterr().out


def test_other_weights_are_another_target_whatever_the_config_says(trained, one_process, tmp_path):
    one = trained("one")
    store = tmp_path / "elsewhere" / "targets"
    folder = target_folder(load_config(one.config_file), store)
    shutil.copytree(target_folder(load_config(one.config_file), one.targets), folder)
    tensors = load_file(folder / "target.safetensors")
    save_file({k: t + 1e-3 for k, t in tensors.items()}, folder / "target.safetensors")
    shutil.copytree(one.path, store.parent / "runs" / "moved")
    moved = RunDir(store.parent / "runs" / "moved")
    with pytest.raises(ValueError, match=r"^one \(tms of seed .*\) and moved \(.*different target"):
        compare_runs([one, moved], ALL, one_process)


def test_one_run_is_no_comparison(trained, one_process):
    with pytest.raises(ValueError, match="two runs or more, and here is 1"):
        compare_runs([trained("one")], ALL, one_process)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
        return main(), *capsys.readouterr()

    return run


def test_the_command_writes_into_the_launch(trained, command, tmp_path):
    for seed in (0, 1):
        trained(f"run{seed}", f"seed={seed}")
    launch = tmp_path / "launches" / "a_launch"
    launch.mkdir(parents=True)
    rows = [{"run_id": f"run{seed}", "goal": "decomposition"} for seed in (0, 1)]
    (launch / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = command("a_launch", "--density", "-1")
    folder = launch / "analysis" / "compare"
    assert code == 0 and f"wrote {folder}" in out and "spd_analysis.report a_launch" in out
    files = sorted(f.name for f in folder.iterdir())
    assert files == ["modules.png", "similarity.png", "summary.json"]
    assert all((folder / png).read_bytes().startswith(b"\x89PNG") for png in files[:2])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["runs"] == ["run0", "run1"] and np.array(summary["matched"]).shape == (2, 2)


def test_the_command_refuses_in_one_line_and_writes_nothing(trained, command, make_run_dir):
    one, bare = trained("one"), make_run_dir("bare")
    bare.config_file.write_text(config_to_yaml(load_config(one.config_file)))
    code, _, err = command("one", "bare")
    assert code == 2 and err.startswith(f"error: no checkpoint in {bare.path} (not launched)")
    assert not (one.path.parent.parent / "analysis").exists()
