"""The merging itself; the package's docstring gives it as pseudocode."""

from collections.abc import Callable

import numpy as np

from spd_analysis.clustering.activations import Activations
from spd_analysis.clustering.config import ClusteringConfig
from spd_analysis.clustering.draw import Bounds, draw_pair
from spd_analysis.clustering.groups import Groups
from spd_analysis.clustering.history import History


def cluster(
    activations: Activations, config: ClusteringConfig, after_iteration: Callable[[int], None]
) -> History:
    """Merge until `config.iters` iterations or one group; `after_iteration` is told k."""
    rng, groups = np.random.default_rng(config.seed), Groups(activations, config.alpha)
    merges, popped, changes = [], [], []
    cost, n_groups = [groups.cost()], [groups.k]
    bounds = None
    while groups.k > 1 and (config.iters is None or len(merges) < config.iters):
        if bounds is None or groups.k < bounds.least_k:
            groups.drop_free_slots()
            bounds = Bounds(groups)
        i, j = draw_pair(groups, bounds, config.draw, rng)
        merges.append((groups.label[i], groups.label[j]))
        groups.merge(i, j)
        changes.append(groups.cost() - cost[-1])
        bounds.take_in(i)
        popped.append(-1)
        if groups.k > 1 and rng.random() < config.pop_component_prob:
            subcomponent = int(rng.integers(len(activations.subcomponents)))
            rest = groups.pop(subcomponent, free=j)
            if rest is not None:
                popped[-1] = subcomponent
                bounds.take_in(rest)
                bounds.take_in(j)
        cost.append(groups.cost())
        n_groups.append(groups.k)
        after_iteration(groups.k)
    return History(
        np.array(merges, np.int32).reshape(-1, 2), np.array(popped, np.int32),
        np.array(changes, np.float64), np.array(cost), np.array(n_groups, np.int32),
    )  # fmt: skip
