"""Costs and changes against a description length written out from the issue's formula."""

import math
from itertools import combinations

import numpy as np
import pytest
from clustering_oracle import binary, description_length, partitions, random_active

from spd_analysis.clustering import cost
from spd_analysis.clustering.groups import Groups


@pytest.mark.parametrize("n, alpha", [(1, 1.0), (4, 0.0), (6, 1.0), (8, 2.5)])
def test_every_partition_costs_what_the_formula_says(n, alpha):
    active = random_active(60, n, seed=n)
    for partition in partitions(n):
        s = np.array([active[:, group].any(1).mean() for group in partition])
        n_members = np.array([len(group) for group in partition])
        assert cost.description_length(s, n_members, alpha) == pytest.approx(
            description_length(active, partition, alpha), abs=1e-12
        )


def test_a_cost_worked_out_by_hand():
    # On half of the samples a group of one, on a quarter a group of three; two groups: one bit.
    s, n_members = np.array([0.5, 0.25]), np.array([1, 3])
    assert cost.description_length(s, n_members, 1.0) == 0.5 * (1 + 1) + 0.25 * (1 + 3)
    assert cost.description_length(s[:1], n_members[:1], 1.0) == 0.5


@pytest.mark.parametrize("n, alpha", [(2, 1.0), (5, 0.5), (6, 1.0)])
def test_every_change_of_every_partition_is_the_difference_of_costs(n, alpha):
    active = random_active(40, n, seed=10 + n)
    for partition in partitions(n):
        k = len(partition)
        if k < 2:
            continue
        before = description_length(active, partition, alpha)
        for i, j in combinations(range(k), 2):
            rest = [g for x, g in enumerate(partition) if x not in (i, j)]
            after = description_length(active, [*rest, partition[i] + partition[j]], alpha)
            s = [active[:, g].any(1).mean() for g in partition]
            both = (active[:, partition[i]].any(1) & active[:, partition[j]].any(1)).mean()
            n_members = np.array([len(g) for g in partition])
            change = sum(s) * math.log2((k - 1) / k) + cost.pair_change(
                (s[i], s[j]), (n_members[i], n_members[j]), both, math.log2(k - 1), alpha
            )
            assert change == pytest.approx(after - before, abs=1e-12)


def test_all_pairs_at_once_are_the_pairs_one_by_one():
    active = random_active(70, 8, seed=3)
    groups = Groups(binary(active), alpha=1.0)
    slots = np.arange(8)
    changes = groups.changes(slots[:, None], slots, groups.bits)
    shared = active.mean(0).sum() * math.log2(7 / 8)
    for i, j in combinations(range(8), 2):
        singles = [[x] for x in range(8) if x not in (i, j)]
        after = description_length(active, [*singles, [i, j]], 1.0)
        before = description_length(active, [[x] for x in range(8)], 1.0)
        assert changes[i, j] + shared == pytest.approx(after - before, abs=1e-9)
        assert changes[i, j] == changes[j, i]
