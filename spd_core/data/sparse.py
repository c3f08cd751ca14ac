"""Sparse features: examples of independent features that are mostly off."""

import torch
from jaxtyping import Float
from torch import Tensor

from spd_core.randomness import Stream
from spd_core.targets.config import SparseFeatureDataConfig


def sparse_features(
    config: SparseFeatureDataConfig, n_features: int, stream: Stream
) -> Float[Tensor, "batch n_features"]:
    """One rank's part of a batch; values are uniform over the range where a feature is on.

    Of a group of synced features, the first decides for all.
    """
    values = stream.uniform(n_features)
    if config.value_range == "minus_one_to_one":
        values = 2 * values - 1
    match config.generation:
        case "at_least_zero_active":
            on = stream.uniform(n_features) < config.feature_probability
            for group in config.synced:
                for feature in group:
                    on[:, feature] = on[:, group[0]]
            return values * on
        case "exactly_one_active":
            active = stream.integers(0, n_features)
            return values * torch.nn.functional.one_hot(active, n_features)
