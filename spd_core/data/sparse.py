"""Sparse features: examples of independent features that are mostly off."""

import torch
from jaxtyping import Float
from torch import Tensor

from spd_core.config import SparseFeatureDataConfig
from spd_core.randomness import BatchStream


def sparse_features(
    config: SparseFeatureDataConfig, n_features: int, stream: BatchStream
) -> Float[Tensor, "batch n_features"]:
    """One rank's part of a batch; values are U[0, 1) where a feature is active."""
    values = stream.uniform(n_features)
    match config.generation:
        case "at_least_zero_active":
            return values * (stream.uniform(n_features) < config.feature_probability)
        case "exactly_one_active":
            active = stream.integers(0, n_features)
            return values * torch.nn.functional.one_hot(active, n_features)
