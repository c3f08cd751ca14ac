from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare, kstest

from spd_core.ci_fns import CausalImportance
from spd_core.component_model import MaskInfo
from spd_core.config.losses import StaticProbabilityConfig, UniformKSubsetConfig
from spd_core.data.batches import Batch
from spd_core.fast.hashed import uniform
from spd_core.fast.masked import LazyMask, masked_product
from spd_core.masks import draw_routes, masks_from_sources, stochastic_masks
from spd_core.randomness import StepRandomness
from spd_core.rows import Rows, at_rows

UNIT = st.floats(0, 1, width=32)


@given(UNIT, UNIT)
def test_formula(ci, r):
    lower = torch.tensor([ci])
    importances = {"a": CausalImportance(lower, lower, "leaky_hard")}
    masks = masks_from_sources(importances, {"a": torch.tensor([r])}, {"a": None})
    m = applied(masks)["a"].mask.item()
    assert m == pytest.approx(ci + (1 - ci) * r, abs=1e-6)
    assert min(ci, r) - 1e-6 <= m <= 1 + 1e-6


def batch_of(names, lower, rank=0, world=1, batch_size=None):
    """A rank's batch in which all modules have the same causal importances."""
    ci = {n: CausalImportance(lower, lower, "leaky_hard") for n in names}
    size = batch_size or world * len(lower)
    randomness = StepRandomness(0, 0, rank, world, size, torch.device("cpu"))
    return Batch(lower, lower, {}, ci, randomness, {})


def applied(masks):
    """The same with all masks as numbers: what they make of activations of 1."""
    return {name: _applied(info) for name, info in masks.items()}


def _applied(info):
    if not isinstance(info.mask, LazyMask):
        return info
    ones = torch.ones_like(at_rows(info.mask.ci, info.rows, info.mask.ci.dim() - 1))
    difference, m_d = masked_product(ones, torch.eye(ones.shape[-1]), info.mask, None)
    if m_d is None:
        return MaskInfo(difference, None, info.rows)
    return MaskInfo(difference + m_d, m_d.expand_as(ones[..., :1])[..., 0], info.rows)


def written_down(masks):
    """The same with all masks as numbers, by the formula: for tests of what is done with them."""
    return {name: _written_down(info) for name, info in masks.items()}


def _written_down(info):
    if not isinstance(info.mask, LazyMask):
        return info
    ci, with_delta = info.mask.ci, info.mask.with_delta
    n_dims, C = ci.dim() - 1, ci.shape[-1]
    r = info.mask.source
    if not isinstance(r, torch.Tensor):
        r = uniform(r, (*ci.shape[1:-1], C + with_delta))
    r = at_rows(r.expand(*ci.shape[:-1], C + with_delta), info.rows, n_dims)
    ci = at_rows(ci, info.rows, n_dims)
    mask = ci + (1 - ci) * r[..., :C]
    return MaskInfo(mask, r[..., C] if with_delta else None, info.rows)


@pytest.fixture
def draw(tms_model):
    def masks(lower, sampling="continuous", delta="true", names=("a",), rank=0, world=1):
        model = tms_model(f"decompose.sampling={sampling}", f"decompose.delta_component={delta}")
        batch = batch_of(names, lower, rank, world)
        return applied(stochastic_masks(model, batch, dict.fromkeys(names), "masks"))

    return masks


@pytest.mark.parametrize("shape", [(2000, 2), (80, 25, 2)])
def test_continuous_sources_are_uniform(shape, draw):
    info = draw(torch.full(shape, 0.4))["a"]
    assert info.mask.shape == shape and info.delta_mask.shape == shape[:-1]
    r = (info.mask.numpy() - 0.4) / 0.6
    assert kstest(r.ravel(), "uniform").pvalue > 0.001
    assert kstest(info.delta_mask.numpy().ravel(), "uniform").pvalue > 0.001
    columns = np.stack([r[..., 0].ravel(), r[..., 1].ravel(), info.delta_mask.numpy().ravel()])
    assert np.abs(np.corrcoef(columns) - np.eye(3)).max() < 0.1


def test_binomial_sources_are_zero_or_one_but_the_delta_is_uniform(draw):
    info = draw(torch.full((2000, 2), 0.4), "binomial")["a"]
    assert {round(v, 6) for v in info.mask.unique().tolist()} == {0.4, 1.0}
    assert (info.mask > 0.7).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert kstest(info.delta_mask.numpy(), "uniform").pvalue > 0.001


def test_importance_one_is_never_masked(draw):
    assert (draw(torch.ones(64, 3))["a"].mask == 1).all()


@pytest.mark.parametrize("sampling", ["continuous", "binomial"])
def test_ranks_draw_different_masks_that_are_together_those_of_one_process(sampling, draw):
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
    ci = {"a": CausalImportance(lower, lower, "leaky_hard")}
    for leading in ((2, 3), (1, 1)):
        source = torch.rand(*leading, 4 + delta)
        info = applied(masks_from_sources(ci, {"a": source}, {"a": None}))["a"]
        wanted = lower.numpy() + (1 - lower.numpy()) * source[..., :4].numpy()
        np.testing.assert_allclose(info.mask.numpy(), wanted, rtol=1e-6)
        assert (info.delta_mask is None) != delta
        if delta:
            assert torch.equal(info.delta_mask, source[..., 4].expand(2, 3))


def test_only_routed_modules_are_masked():
    lower, rows = torch.rand(2, 3), Rows.of(torch.tensor([True, False]))
    ci = {n: CausalImportance(lower, lower, "leaky_hard") for n in ("a", "b")}
    sources = {n: torch.rand(2, 4) for n in ci}
    masks = masks_from_sources(ci, sources, {"b": rows})
    assert list(masks) == ["b"] and masks["b"].rows is rows
    wanted = lower[0] + (1 - lower[0]) * sources["b"][0, :3]
    torch.testing.assert_close(masks["b"].mask[0], wanted)


def test_modules_draw_different_numbers_and_delta_can_be_off(draw):
    masks = draw(torch.zeros(64, 3), delta="false", names=("a", "b"))
    assert masks["a"].delta_mask is None
    assert not torch.isin(masks["a"].mask, masks["b"].mask).any()


# ------------------------------------------------------------------ routes

NAMES = ["a", "b", "c"]
UNIFORM_K = UniformKSubsetConfig(kind="uniform_k_subset")


def static(p):
    return StaticProbabilityConfig(kind="static_probability", p=p)


def routes_of(routing, shape, batch, names=NAMES):
    (routes,) = draw_routes(batch_of(names, torch.rand(batch, *shape, 2)), routing, "route")
    assert list(routes) == names
    return {name: where(rows, (batch, *shape)) for name, rows in routes.items()}


def where(rows, shape):
    """The positions of `rows` as a mask; what fills them up repeats them."""
    assert len(rows.index) % 32 == 0 and torch.isin(rows.index, rows.index[: rows.n]).all()
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[rows.index[: rows.n]] = True
    assert mask.sum() == rows.n
    return mask


def chosen(shape, batch):
    routes = routes_of(UNIFORM_K, shape, batch)
    return torch.stack(list(routes.values()), -1).reshape(-1, 3)


@pytest.mark.parametrize("shape, batch", [((), 6400), ((40,), 160)])
def test_k_is_uniform_and_so_is_the_subset_of_each_size(shape, batch):
    rows = chosen(shape, batch)
    subsets = Counter(tuple(i for i in range(3) if row[i]) for row in rows.tolist())
    sizes = [sum(n for s, n in subsets.items() if len(s) == k) for k in range(4)]
    assert sizes[0] == 0 and chisquare(sizes[1:]).pvalue > 0.001
    for k in (1, 2):
        assert chisquare([subsets[s] for s in combinations(range(3), k)]).pvalue > 0.001


def test_positions_are_independent():
    first, second = chosen((2,), 3200).reshape(-1, 2, 3).unbind(1)
    joint = Counter(zip(first.sum(-1).tolist(), second.sum(-1).tolist(), strict=True))
    assert chisquare([joint[i, j] for i in (1, 2, 3) for j in (1, 2, 3)]).pvalue > 0.001


def test_one_module_is_always_chosen():
    assert routes_of(UNIFORM_K, (), 64, ["a"])["a"].all()


@pytest.mark.parametrize("shape, batch", [((), 3200), ((10,), 320)])
def test_static_probability(shape, batch):
    routes = routes_of(static(0.3), shape, batch)
    for route in routes.values():
        assert route.shape == (batch, *shape)
        assert binomtest(int(route.sum()), route.numel(), 0.3).pvalue > 0.001
    both = int((routes["a"] & routes["b"]).sum())
    assert binomtest(both, 3200, 0.09).pvalue > 0.001


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_static_probability_ends(p):
    assert all((r == bool(p)).all() for r in routes_of(static(p), (), 64).values())


def test_all_is_everywhere_and_layerwise_one_module_at_a_time():
    batch = batch_of(NAMES, torch.rand(4, 2))
    assert draw_routes(batch, "all", "route") == [{"a": None, "b": None, "c": None}]
    assert draw_routes(batch, "layerwise", "route") == [{"a": None}, {"b": None}, {"c": None}]


@pytest.mark.parametrize("routing", [UNIFORM_K, static(0.4)], ids=["uniform_k_subset", "static"])
def test_ranks_draw_different_routes_that_are_together_those_of_one_process(routing):
    def drawn(n, rank, world):
        batch = batch_of(NAMES, torch.rand(n, 2, 3), rank, world, batch_size=40)
        (routes,) = draw_routes(batch, routing, "route")
        return torch.stack([where(rows, (n, 2)) for rows in routes.values()])

    ranks = [drawn(n, r, 3) for r, n in enumerate((13, 13, 14))]
    assert [r.shape[1] for r in ranks] == [13, 13, 14]
    assert not torch.equal(ranks[0], ranks[1])
    assert torch.equal(torch.cat(ranks, 1), drawn(40, 0, 1))


def test_a_module_at_other_positions_than_the_first_is_refused_by_name():
    batch = batch_of(["a", "b"], torch.rand(3, 3, 2))
    alone = torch.rand(3, 2)
    batch.distinct_ci["b"] = CausalImportance(alone, alone, "leaky_hard")
    with pytest.raises(ValueError, match=r"'b' runs at positions \(3,\), .* \(3, 3\)"):
        draw_routes(batch, UNIFORM_K, "route")
