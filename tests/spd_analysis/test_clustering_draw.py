"""Draws against the distribution over all pairs, counted out."""

from itertools import combinations

import numpy as np
import pytest
from clustering_oracle import as_partition, binary, description_length, random_active

from spd_analysis.clustering.config import MCMCDraw, RangeDraw
from spd_analysis.clustering.draw import Bounds, draw_pair
from spd_analysis.clustering.groups import Groups

N, DRAWS = 7, 1200


def wanted(active, groups, draw):
    """Pair of slots -> probability, from the costs of whole partitions."""
    partition = {s: np.flatnonzero(groups.slot_of == s).tolist() for s in groups.alive.tolist()}
    pairs = list(combinations(partition, 2))
    costs = []
    for i, j in pairs:
        rest = [group for slot, group in partition.items() if slot not in (i, j)]
        costs.append(description_length(active, [*rest, partition[i] + partition[j]], 1.0))
    costs = np.array(costs)
    if isinstance(draw, RangeDraw):
        weights = costs <= costs.min() + draw.threshold * np.ptp(costs) + 1e-12
    else:
        weights = np.exp((costs.min() - costs) / draw.temperature)
    return dict(zip(pairs, weights / weights.sum(), strict=True))


def after_merges(n_merges):
    """Groups on their way, with bounds that were made at the start of it."""
    active = random_active(300, N, seed=5)
    groups = Groups(binary(active), alpha=1.0)
    bounds, rng = Bounds(groups), np.random.default_rng(1)
    for _ in range(n_merges):
        i, j = draw_pair(groups, bounds, RangeDraw(kind="range", threshold=0.3), rng)
        groups.merge(i, j)
        bounds.take_in(i)
    return active, groups, bounds, rng


@pytest.mark.parametrize("n_merges", [0, 1, 2])
@pytest.mark.parametrize("draw", [
    RangeDraw(kind="range", threshold=0.0), RangeDraw(kind="range", threshold=0.3),
    RangeDraw(kind="range", threshold=1.0), MCMCDraw(kind="mcmc", temperature=0.02),
    MCMCDraw(kind="mcmc", temperature=0.5),
], ids=str)  # fmt: skip
def test_pairs_come_as_often_as_they_should(draw, n_merges):
    active, groups, bounds, rng = after_merges(n_merges)
    probabilities = wanted(active, groups, draw)
    counts = dict.fromkeys(probabilities, 0)
    for _ in range(DRAWS):
        i, j = sorted(draw_pair(groups, bounds, draw, rng))
        counts[i, j] += 1
    for pair, p in probabilities.items():
        assert abs(counts[pair] / DRAWS - p) <= 4.5 * np.sqrt(p * (1 - p) / DRAWS) + 1e-12, pair


def test_bounds_hold_and_extremes_are_exact_through_merges_and_pops():
    """Also after pops, and where bounds were made long ago."""
    n, active = 30, random_active(200, 30, seed=7)
    groups, rng = Groups(binary(active), alpha=1.0), np.random.default_rng(0)
    bounds = Bounds(groups)
    while groups.k > bounds.least_k:
        slots = groups.alive
        i, j = rng.choice(slots, 2, replace=False)
        groups.merge(i, j)
        bounds.take_in(i)
        if rng.random() < 0.5 and (rest := groups.pop(int(rng.integers(n)), j)) is not None:
            bounds.take_in(rest)
            bounds.take_in(j)
        slots, bits = groups.alive, groups.bits
        changes = groups.changes(slots[:, None], slots, bits)
        off = ~np.eye(groups.k, dtype=bool)
        lower, upper = bounds.at(bits)
        assert (lower[:, None] <= changes + 1e-9)[off].all()
        assert (-upper[:, None] >= changes - 1e-9)[off].all()
        assert bounds.extreme(1) == changes[off].min()
        assert bounds.extreme(-1) == changes[off].max()


def test_groups_that_never_fire_can_be_merged():
    active = np.zeros((50, 3), int)
    groups = Groups(binary(active), alpha=1.0)
    bounds, rng = Bounds(groups), np.random.default_rng(0)
    for draw in (RangeDraw(kind="range", threshold=0.05), MCMCDraw(kind="mcmc", temperature=1e-6)):
        i, j = draw_pair(groups, bounds, draw, rng)
        assert i != j
    assert as_partition(groups.slot_of) == [[0], [1], [2]]
