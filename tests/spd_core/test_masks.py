import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from spd_core.ci_fns import CausalImportance
from spd_core.masks import interpolate, stochastic_masks
from spd_core.randomness import StepRandomness

UNIT = st.floats(0, 1, width=32)


@given(UNIT, UNIT)
def test_formula(ci, r):
    m = interpolate(torch.tensor([ci]), torch.tensor([r])).item()
    assert m == pytest.approx(ci + (1 - ci) * r, abs=1e-6)
    assert min(ci, r) - 1e-6 <= m <= 1 + 1e-6


def draw(lower, sampling="continuous", delta=True, names=("a",)):
    ci = {n: CausalImportance(lower, lower, lower) for n in names}
    stream = StepRandomness(0, 0, 0, 1, len(lower), torch.device("cpu")).batch_stream("masks")
    return stochastic_masks(ci, sampling, delta, dict.fromkeys(names), stream)


@pytest.mark.parametrize("shape", [(2000, 2), (80, 25, 2)])
def test_continuous_sources_are_uniform(shape):
    info = draw(torch.full(shape, 0.4))["a"]
    assert info.mask.shape == shape and info.delta_mask.shape == shape[:-1]
    r = (info.mask.numpy() - 0.4) / 0.6
    assert kstest(r.ravel(), "uniform").pvalue > 0.001
    assert kstest(info.delta_mask.numpy().ravel(), "uniform").pvalue > 0.001
    columns = np.stack([r[..., 0].ravel(), r[..., 1].ravel(), info.delta_mask.numpy().ravel()])
    assert np.abs(np.corrcoef(columns) - np.eye(3)).max() < 0.1


def test_binomial_sources_are_zero_or_one_but_the_delta_is_uniform():
    info = draw(torch.full((2000, 2), 0.4), "binomial")["a"]
    assert {round(v, 6) for v in info.mask.unique().tolist()} == {0.4, 1.0}
    assert (info.mask > 0.7).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert kstest(info.delta_mask.numpy(), "uniform").pvalue > 0.001


def test_importance_one_is_never_masked():
    assert (draw(torch.ones(64, 3))["a"].mask == 1).all()


def test_modules_draw_different_numbers_and_delta_can_be_off():
    masks = draw(torch.zeros(64, 3), delta=False, names=("a", "b"))
    assert masks["a"].delta_mask is None
    assert not torch.isin(masks["a"].mask, masks["b"].mask).any()
