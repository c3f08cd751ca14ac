"""Whole clusterings: every step's cost is its partition's, and the cheap finds what it should."""

import numpy as np
import pytest
from clustering_oracle import (
    as_partition,
    binary,
    description_length,
    partitions,
    random_active,
    raw,
)

from spd_analysis.clustering.config import DEFAULT, load_config
from spd_analysis.clustering.merge import cluster

GREEDY = "draw={kind: range, threshold: 0.0}"
MCMC = "draw={kind: mcmc, temperature: 0.05}"


def run(activations, *overrides):
    told = []
    history = cluster(activations, load_config(DEFAULT, overrides), told.append)
    assert told == history.n_groups[1:].tolist()
    return history


def replay(history, n):
    """The partitions, from the history's arrays alone, as a user without this package would."""
    labels = np.arange(n)
    yield labels.copy()
    for (stays, ends), popped in zip(history.merges, history.popped, strict=True):
        labels[labels == ends] = stays
        if popped >= 0:
            labels[popped] = ends
        yield labels.copy()


@pytest.mark.parametrize("kind", ["binary", "raw"])
@pytest.mark.parametrize("n", [1, 2, 5, 8, 23])
@pytest.mark.parametrize("overrides", [
    (GREEDY,), (MCMC,), ("alpha=0.0",), ("pop_component_prob=0.7", "iters=60"),
    (MCMC, "pop_component_prob=0.4", "alpha=3.0"), ("iters=3",),
])  # fmt: skip
def test_no_step_reports_a_cost_that_is_not_its_partitions(kind, n, overrides):
    active = random_active(150, n, seed=n)
    importances = active * np.random.default_rng(n).uniform(0.1, 1, active.shape)
    importances = importances.astype(np.float32)
    values = active if kind == "binary" else importances
    history = run(binary(active) if kind == "binary" else raw(importances), *overrides)
    alpha = load_config(DEFAULT, overrides).alpha
    before = None
    for step, labels in enumerate(replay(history, n)):
        partition = as_partition(labels)
        assert history.n_groups[step] == len(partition)
        wanted = description_length(values, partition, alpha)
        assert history.cost[step] == pytest.approx(wanted, abs=1e-9)
        if step and history.popped[step - 1] < 0:
            change = history.change[step - 1]
            assert change == pytest.approx(wanted - before, abs=1e-9)
        before = wanted
    assert step == history.iters
    if "iters=3" in overrides:
        assert history.iters == min(3, n - 1)
    elif "iters=60" not in overrides:
        assert history.n_groups[-1] == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pop", ["0.0", "0.5"])
def test_without_a_margin_each_merge_is_the_best_there_is(seed, pop):
    n, active = 8, random_active(90, 8, seed)
    history = run(binary(active), GREEDY, f"seed={seed}", f"pop_component_prob={pop}", "iters=30")
    for step, labels in enumerate(list(replay(history, n))[:-1]):
        partition = as_partition(labels)
        costs = [
            description_length(active, [*partition[:i], *partition[i + 1 : j], *partition[j + 1 :],
                                        partition[i] + partition[j]], 1.0)
            for j in range(len(partition)) for i in range(j)
        ]  # fmt: skip
        now = description_length(active, partition, 1.0)
        assert history.change[step] == pytest.approx(min(costs) - now, abs=1e-9)


def test_what_always_fires_together_is_one_component():
    """Three features, each with a subcomponent in two modules: the best of all partitions."""
    rng = np.random.default_rng(0)
    features = (rng.random((400, 3)) < 0.1).astype(int)
    active = np.concatenate([features, features[:, [2, 0, 1]]], axis=1)
    history = run(binary(active))
    labels = list(replay(history, 6))[history.best]
    assert sorted(as_partition(labels)) == [[0, 4], [1, 5], [2, 3]]
    best = min(description_length(active, partition, 1.0) for partition in partitions(6))
    assert history.cost[history.best] == pytest.approx(best)


def test_the_same_seed_is_the_same_clustering_and_another_is_not():
    active = random_active(200, 30, seed=1)
    first, again, other = (
        run(binary(active), MCMC, "pop_component_prob=0.3", f"seed={seed}") for seed in (0, 0, 1)
    )
    assert (first.merges == again.merges).all() and (first.cost == again.cost).all()
    assert first.iters != other.iters or (first.merges != other.merges).any()


def test_who_is_popped_was_in_company_and_is_alone_afterwards():
    active = random_active(100, 40, seed=2)
    history = run(binary(active), "pop_component_prob=0.5", "iters=300")
    assert (history.popped >= 0).sum() > 10
    for labels, who in zip(list(replay(history, 40))[1:], history.popped, strict=True):
        if who >= 0:
            assert (labels == labels[who]).sum() == 1
