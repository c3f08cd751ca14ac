from collections import Counter
from itertools import combinations

import pytest
import torch
from scipy.stats import binomtest, chisquare

from spd_core.randomness import StepRandomness
from spd_core.routing import route_all, route_static_probability, route_uniform_k_subset

NAMES = ["a", "b", "c"]


def stream(batch, rank=0, world=1):
    return StepRandomness(3, 0, rank, world, batch, torch.device("cpu")).batch_stream("route")


def chosen(shape, batch):
    routes = route_uniform_k_subset(NAMES, shape, stream(batch))
    assert list(routes) == NAMES
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
    assert route_uniform_k_subset(["a"], (), stream(64))["a"].all()


@pytest.mark.parametrize("shape, batch", [((), 3200), ((10,), 320)])
def test_static_probability(shape, batch):
    routes = route_static_probability(NAMES, 0.3, shape, stream(batch))
    for route in routes.values():
        assert route.shape == (batch, *shape)
        assert binomtest(int(route.sum()), route.numel(), 0.3).pvalue > 0.001
    both = int((routes["a"] & routes["b"]).sum())
    assert binomtest(both, 3200, 0.09).pvalue > 0.001


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_static_probability_ends(p):
    routes = route_static_probability(NAMES, p, (), stream(64))
    assert all((r == bool(p)).all() for r in routes.values())


def test_route_all_is_everywhere():
    assert route_all(NAMES) == {"a": None, "b": None, "c": None}


@pytest.mark.parametrize("draw", [
    lambda s: route_uniform_k_subset(NAMES, (2,), s),
    lambda s: route_static_probability(NAMES, 0.4, (2,), s),
], ids=["uniform_k_subset", "static_probability"])  # fmt: skip
def test_ranks_draw_different_routes_that_are_together_those_of_one_process(draw):
    ranks = [torch.stack(list(draw(stream(40, r, 3)).values())) for r in range(3)]
    assert [r.shape[1] for r in ranks] == [13, 13, 14]
    assert not torch.equal(ranks[0], ranks[1])
    assert torch.equal(torch.cat(ranks, 1), torch.stack(list(draw(stream(40)).values())))
