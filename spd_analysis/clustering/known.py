"""Where the features are known: does each have a component of its own, in every module?"""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment

PRESENT = 0.5  # causal importance of a subcomponent that stands for a feature


def features_found(
    ci: dict[str, Float[np.ndarray, "n_features C"]],
    subcomponents: list[str],
    labels: Int[np.ndarray, "n"],
) -> Bool[np.ndarray, "n_features"]:
    """Which features have a group of their own with a subcomponent of theirs of every module.

    `ci` are importances of single features. Groups and features are matched one to one (Hungarian),
    so that in as many modules as possible the group holds a subcomponent important for the feature.
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
    matched = linear_sum_assignment(-n_modules)
    found = np.zeros(n_features, bool)
    found[matched[0]] = n_modules[matched] == len(ci)
    return found
