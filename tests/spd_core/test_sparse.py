import pytest
import torch
from scipy.stats import binomtest, chisquare, kstest

from spd_core.data.sparse import sparse_features
from spd_core.randomness import StepRandomness
from spd_core.targets.config import SparseFeatureDataConfig


def draw(generation, p, rank=0, world=1, step=0, value_range="zero_to_one", synced=()):
    config = SparseFeatureDataConfig(
        kind="sparse_features",
        feature_probability=p,
        generation=generation,
        value_range=value_range,
        synced=list(synced),
    )
    randomness = StepRandomness(0, step, rank, world, 6400, torch.device("cpu"))
    return sparse_features(config, 5, randomness.batch_stream("data"))


@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_features_are_on_independently(p):
    x = draw("at_least_zero_active", p)
    on = x > 0
    assert x.shape == (6400, 5)
    assert binomtest(int(on.sum()), on.numel(), p - 1e-7).pvalue > 0.001
    assert binomtest(int((on[:, 0] & on[:, 1]).sum()), 6400, p * p - 1e-7).pvalue > 0.001
    assert kstest(x[on].numpy(), "uniform").pvalue > 0.001


def test_exactly_one_feature_is_on():
    x = draw("exactly_one_active", 0.05)
    assert ((x > 0).sum(1) == 1).all()
    assert chisquare((x > 0).sum(0).numpy()).pvalue > 0.001
    assert kstest(x.max(1).values.numpy(), "uniform").pvalue > 0.001


@pytest.mark.parametrize("generation", ["at_least_zero_active", "exactly_one_active"])
def test_ranks_share_one_batch_and_steps_do_not(generation):
    whole = draw(generation, 0.3)
    ranks = [draw(generation, 0.3, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat(ranks), whole)
    assert not torch.equal(draw(generation, 0.3, step=1), whole)


def test_values_can_be_negative():
    x = draw("at_least_zero_active", 0.5, value_range="minus_one_to_one")
    assert kstest(x[x != 0].numpy(), "uniform", args=(-1, 2)).pvalue > 0.001


def test_synced_features_are_on_together_with_values_of_their_own():
    x = draw("at_least_zero_active", 0.3, synced=[[0, 3], [4, 1, 2]])
    on = x > 0
    assert torch.equal(on[:, 0], on[:, 3]) and torch.equal(on[:, 4], on[:, 1] & on[:, 2])
    assert not torch.equal(x[:, 0], x[:, 3])
    assert binomtest(int((on[:, 0] & on[:, 4]).sum()), 6400, 0.09).pvalue > 0.001
