import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from spd_core.ci_fns import CausalImportance
from spd_core.masks import interpolate, masks_from_sources, stochastic_masks
from spd_core.randomness import StepRandomness

UNIT = st.floats(0, 1, width=32)


@given(UNIT, UNIT)
def test_formula(ci, r):
    m = interpolate(torch.tensor([ci]), torch.tensor([r])).item()
    assert m == pytest.approx(ci + (1 - ci) * r, abs=1e-6)
    assert min(ci, r) - 1e-6 <= m <= 1 + 1e-6


def draw(lower, sampling="continuous", delta=True, names=("a",), rank=0, world=1):
    ci = {n: CausalImportance(lower, lower, lower) for n in names}
    batch = world * len(lower)
    stream = StepRandomness(0, 0, rank, world, batch, torch.device("cpu")).batch_stream("masks")
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


@pytest.mark.parametrize("sampling", ["continuous", "binomial"])
def test_ranks_draw_different_masks_that_are_together_those_of_one_process(sampling):
    lower = torch.zeros(6, 3, 4)
    ranks = [draw(lower, sampling, rank=r, world=3)["a"] for r in range(3)]
    whole = draw(torch.zeros(18, 3, 4), sampling)["a"]
    for kind in ("mask", "delta_mask"):
        parts = [getattr(info, kind) for info in ranks]
        assert not torch.equal(parts[0], parts[1]) and not torch.equal(parts[1], parts[2])
        assert torch.equal(torch.cat(parts), getattr(whole, kind))


@pytest.mark.parametrize("delta", [True, False])
def test_given_sources_are_shared_or_one_per_datapoint(delta):
    """The last of C + 1 sources is the delta's mask, as it is."""
    lower = torch.rand(2, 3, 4)
    ci = {"a": CausalImportance(lower, lower, lower)}
    for leading in ((2, 3), (1, 1)):
        source = torch.rand(*leading, 4 + delta)
        info = masks_from_sources(ci, {"a": source}, {"a": None})["a"]
        wanted = lower.numpy() + (1 - lower.numpy()) * source[..., :4].numpy()
        np.testing.assert_allclose(info.mask.numpy(), wanted, rtol=1e-6)
        assert (info.delta_mask is None) != delta
        if delta:
            assert torch.equal(info.delta_mask, source[..., 4])


def test_only_routed_modules_are_masked():
    lower, route = torch.rand(2, 3), torch.tensor([True, False])
    ci = {n: CausalImportance(lower, lower, lower) for n in ("a", "b")}
    sources = {n: torch.rand(2, 4) for n in ci}
    masks = masks_from_sources(ci, sources, {"b": route})
    assert list(masks) == ["b"] and torch.equal(masks["b"].route, route)


def test_modules_draw_different_numbers_and_delta_can_be_off():
    masks = draw(torch.zeros(64, 3), delta=False, names=("a", "b"))
    assert masks["a"].delta_mask is None
    assert not torch.isin(masks["a"].mask, masks["b"].mask).any()
