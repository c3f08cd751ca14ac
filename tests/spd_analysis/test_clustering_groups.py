"""Activations and co-activations of groups that merge and pop, against the samples themselves."""

import numpy as np
import pytest
from clustering_oracle import binary, random_active, raw

from spd_analysis.clustering.groups import Groups


def check(groups, values):
    """All sums from the values of the members of each group."""
    columns = {s: values[:, groups.slot_of == s].max(1) for s in groups.alive.tolist()}
    assert sorted(columns) == sorted(set(groups.slot_of.tolist()))
    for slot, column in columns.items():
        assert groups.sums[slot] == pytest.approx(column.sum(), rel=1e-6)
        assert groups.n_members[slot] == (groups.slot_of == slot).sum()
        for other, its in columns.items():
            common = np.minimum(column, its).sum()
            assert groups.co_sums[slot, other] == pytest.approx(common, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", ["binary", "raw"])
@pytest.mark.parametrize("n_samples", [1, 63, 64, 1500])
def test_they_stay_true_through_merges_pops_and_tidying(kind, n_samples):
    n, rng = 12, np.random.default_rng(n_samples)
    active = random_active(n_samples, n, seed=n_samples)
    values = active if kind == "binary" else active * rng.uniform(0.1, 1, active.shape)
    groups = Groups(binary(active) if kind == "binary" else raw(values), alpha=1.0)
    check(groups, values)
    while groups.k > 2:
        i, j = rng.choice(groups.alive, 2, replace=False).tolist()
        groups.merge(i, j)
        check(groups, values)
        who = int(rng.integers(n))
        alone = (groups.slot_of == groups.slot_of[who]).sum() == 1
        rest = groups.pop(who, j)
        assert (rest is None) == alone
        check(groups, values)
        if rest is not None:
            groups.merge(rest, j)
            assert groups.slot_of[who] == rest
        if rng.random() < 0.3:
            groups.drop_free_slots()
            assert groups.alive.tolist() == list(range(groups.k))
            check(groups, values)


def test_too_many_samples_to_count_exactly_are_refused():
    activations = binary(np.ones((64, 2), int))
    object.__setattr__(activations, "n_samples", 2**24)
    with pytest.raises(ValueError, match="too many"):
        Groups(activations, alpha=1.0)
