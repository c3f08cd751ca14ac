"""Numbers against the same hash in Python's own integers, and what they are meant for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spd_core.fast.hashed import Draw, hashed, uniform

KEYS, PLACES = st.integers(0, 2**63 - 1), st.integers(0, 2**40)


def splitmix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def by_hand(key, step, place):
    inner = splitmix((key + place) % 2**64)
    return (splitmix((inner + step * 0x9E3779B97F4A7C15) % 2**64) >> 40) / 2**24


def draw(key=17, step=0, first=0, n=20_000, rows=None):
    return Draw(torch.tensor(key), torch.tensor(step), first, n, rows)


@given(KEYS, PLACES, PLACES)
def test_a_number_is_the_hash_of_its_place(key, step, start):
    got = hashed(torch.tensor(key), torch.tensor(step), start, 3, torch.float64)
    assert got.tolist() == [by_hand(key, step, start + i) for i in range(3)]


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("rows", [None, [4, 0, 2]])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_examples_have_the_numbers_of_their_places(rows, n_threads):
    """Example 2^33 + j of a batch, with two times three numbers each."""
    key, step, first = 2**63 - 5, 2**31, 2**33
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    wanted_rows = None if rows is None else torch.tensor(rows)
    got = uniform(draw(key, step, first, 5, wanted_rows), (2, 3))
    torch.set_num_threads(before)
    each = range(5) if rows is None else rows
    wanted = [by_hand(key, step, (first + j) * 6 + i) for j in each for i in range(6)]
    assert got.dtype == torch.float32 and got.shape == (len(each), 2, 3)
    assert got.flatten().tolist() == wanted


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("lag", [1, 7, 1000])
def test_they_are_uniform_and_independent(lag):
    drawn = uniform(draw(), (50,)).flatten().double()
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-3
    pairs = torch.stack([drawn[:-lag], drawn[lag:]]).mul(16).long()
    counts = torch.bincount(pairs[0] * 16 + pairs[1], minlength=256)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    later = uniform(draw(step=lag), (50,)).flatten().double()
    assert abs(torch.corrcoef(torch.stack([drawn, later]))[0, 1]) < 5e-3
