"""Where the features are known: does each have a component of its own, in every module?"""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment

PRESENT = 0.5  # causal importance of a subcomponent that stands for a feature


def modules_held(
    ci: dict[str, Float[np.ndarray, "n_features C"]],
    subcomponents: list[str],
    labels: Int[np.ndarray, "n"],
) -> Int[np.ndarray, "n_features n_groups"]:
    """Of how many modules a group holds a subcomponent that is important for the feature.

    `ci` are importances of single features, by module.
    """
    groups, group_of = np.unique(labels, return_inverse=True)
    n_features = len(next(iter(ci.values())))
    n_modules = np.zeros((n_features, len(groups)), int)
    for module, values in ci.items():
        present = np.zeros((n_features, len(groups)), bool)
        for name, group in zip(subcomponents, group_of, strict=True):
            path, _, index = name.rpartition(":")
            if path == module:
                present[:, group] |= values[:, int(index)] > PRESENT
        n_modules += present
    return n_modules


def features_found(
    n_modules: Int[np.ndarray, "n_features n_groups"], n_all: int
) -> Bool[np.ndarray, "n_features"]:
    """Which features have a group of their own with a subcomponent of theirs of all modules.

    Groups and features are matched one to one (Hungarian), so that in as many modules as possible
    the group holds a subcomponent important for the feature.
    """
    matched = linear_sum_assignment(-n_modules)
    found = np.zeros(len(n_modules), bool)
    found[matched[0]] = n_modules[matched] == n_all
    return found


def features_joined(
    n_modules: Int[np.ndarray, "n_features n_groups"], n_all: int
) -> Bool[np.ndarray, "n_features"]:
    """Which features have a group, their own or one of several features, with all modules."""
    return (n_modules == n_all).any(1)
