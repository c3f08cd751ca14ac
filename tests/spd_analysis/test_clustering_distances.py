"""Distances between partitions by trying all matchings; ensembles on disk."""

import json
import shutil
import sys
from itertools import combinations, permutations

import numpy as np
import pytest
from clustering_oracle import binary, random_active

from spd_analysis.clustering.config import DEFAULT, load_config
from spd_analysis.clustering.distances import (
    hamming_distance,
    load_ensemble,
    main,
    matching_distance,
)
from spd_analysis.clustering.history import Source, save
from spd_analysis.clustering.merge import cluster
from spd_launch.config import config_to_yaml

ALIVE = ([0, 1, 2, 3, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7, 9], [1, 2, 3, 4, 6, 7, 9])


def slow_hamming(a, b):
    """Over every way to match the labels of one to those of the other."""
    k = max(a.max(), b.max()) + 1
    return min(np.mean(np.array(p)[a] != b) for p in permutations(range(k)))


def slow_matching(a, b):
    pairs = list(combinations(range(len(a)), 2))
    return np.mean([(a[i] == a[j]) != (b[i] == b[j]) for i, j in pairs])


@pytest.mark.parametrize("seed", range(12))
def test_distances_are_those_over_all_matchings(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 6, 11), rng.integers(0, 1 + seed % 6, 11)
    assert hamming_distance(a, b) == pytest.approx(slow_hamming(a, b))
    assert matching_distance(a, b) == pytest.approx(slow_matching(a, b))
    assert hamming_distance(b, a) == pytest.approx(hamming_distance(a, b))


def test_names_of_groups_do_not_matter():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 40, 300)
    renamed = (1000 + rng.permutation(40))[a]
    assert hamming_distance(a, renamed) == 0 and matching_distance(a, renamed) == 0
    moved = renamed.copy()
    moved[:3] = 5
    assert hamming_distance(a, moved) == pytest.approx(3 / 300)


def test_one_group_against_none():
    apart, together = np.arange(10), np.zeros(10, int)
    assert hamming_distance(apart, together) == pytest.approx(0.9)
    assert matching_distance(apart, together) == 1.0
    assert matching_distance(apart[:1], together[:1]) == 0.0


@pytest.fixture
def ensemble(make_run_dir, make_config):
    """Three members that found different subcomponents alive: `ALIVE` of ten."""
    run_dir = make_run_dir("a_run")
    run_dir.config_file.write_text(config_to_yaml(make_config()))
    folder = run_dir.path / "clusterings" / "ensemble"
    for seed, alive in enumerate(ALIVE):
        config = load_config(DEFAULT, [f"seed={seed}"])
        history = cluster(binary(random_active(80, len(alive), seed)), config, lambda _: None)
        names = [f"linear{1 + i // 5}:{i + 5}" for i in alive]
        (folder / f"seed_{seed}").mkdir(parents=True)
        save(folder / f"seed_{seed}", history, Source("a_run", 6, 80, 2, names), config)
    return run_dir, folder


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["distances", *map(str, arguments)])
        return main(), *capsys.readouterr()

    return run


def test_histories_share_one_set_of_subcomponents(ensemble):
    _, folder = ensemble
    members = load_ensemble(folder, 3)
    names = [f"linear1:{i}" for i in (5, 6, 7, 8, 9)] + [f"linear2:{i}" for i in (10, 11, 12, 14)]
    assert members.subcomponents == names  # nobody saw linear2:13 alive, and 9 comes before 10
    for member, alive in enumerate(ALIVE):
        start, end = members.labels(member, np.array([0, len(alive) - 1]))
        assert len(set(start.tolist())) == 9
        dead = [i for i, who in enumerate((0, 1, 2, 3, 4, 5, 6, 7, 9)) if who not in alive]
        assert len(set(end.tolist())) == 1 + len(dead)
        assert all((end == end[i]).sum() == 1 for i in dead)


def test_the_command_writes_arrays_and_a_picture(ensemble, command):
    run_dir, folder = ensemble
    code, out, _ = command(run_dir.path, "--n", 3, "--points", 4)
    assert code == 0 and "next: python -m spd_launch +pipeline=clustering" in out
    arrays = np.load(folder / "distances" / "distances.npz")
    record = json.loads((folder / "distances" / "distances.json").read_text())
    assert arrays["seeds"].tolist() == record["seeds"] == [0, 1, 2]
    m, n = 3, len(record["subcomponents"])
    assert arrays["hamming"].shape == arrays["matching"].shape == (len(arrays["iterations"]), m, m)
    assert (arrays["hamming"][0] == 0).all()  # nothing is merged yet
    assert arrays["labels_best"].shape == (m, n)
    for i, j in combinations(range(m), 2):
        a, b = arrays["labels_best"][[i, j]]
        assert arrays["hamming_best"][i, j] == pytest.approx(hamming_distance(a, b))
        assert arrays["matching_best"][j, i] == pytest.approx(slow_matching(a, b))
    assert (folder / "distances" / "distances.png").stat().st_size > 10000


def test_members_may_be_added_later_and_each_counts_once(ensemble, command):
    run_dir, folder = ensemble
    shutil.move(folder / "seed_2", folder.parent / "aside")
    assert command(run_dir.path, "--points", 3)[0] == 0
    assert np.load(folder / "distances" / "distances.npz")["seeds"].tolist() == [0, 1]
    shutil.move(folder.parent / "aside", folder / "seed_2")
    (folder / ".seed_2.0123").mkdir()  # what a task that was killed may leave behind
    (folder / "seed_2_old").mkdir()
    assert command(run_dir.path, "--points", 3)[0] == 0
    assert np.load(folder / "distances" / "distances.npz")["seeds"].tolist() == [0, 1, 2]
    shutil.copytree(folder / "seed_2", folder / "seed_3")
    code, _, error = command(run_dir.path)
    assert code == 2 and "seed_3 is the clustering of seed 2" in error


def test_an_ensemble_that_is_no_ensemble_is_refused(ensemble, command):
    run_dir, folder = ensemble
    code, _, error = command(run_dir.path, "--n", 5)
    assert code == 2 and "lacks 2 of 5 members, seed 3, 4" in error
    other = folder.with_name("other")
    shutil.copytree(folder / "seed_0", other / "seed_0")
    code, _, error = command(run_dir.path, "--name", "other")
    assert code == 2 and "holds 1 clustering(s): distances need two" in error
    record = json.loads((folder / "seed_1" / "history.json").read_text())
    shutil.copytree(folder / "seed_1", other / "seed_1")
    other_config = {"config": {**record["config"], "alpha": 2.0}}
    wrong = {"seed_1 is of a_run at step 5": {"step": 5}, "another config": other_config}
    for message, change in wrong.items():
        (other / "seed_1" / "history.json").write_text(json.dumps(record | change))
        code, _, error = command(run_dir.path, "--name", "other")
        assert code == 2 and message in error
    assert command(run_dir.path, "--name", "nothing")[0] == 2
    assert not (folder / "distances").exists() and not (other / "distances").exists()
