"""Counted numbers against the same hash in Python's own integers, and what they are meant for."""

import hashlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spd_core.fast.counted import CountedStream, hashed
from spd_core.randomness import StepRandomness

CPU = torch.device("cpu")


def splitmix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def by_hand(key, step, place):
    inner = splitmix((key + place) % 2**64)
    return (splitmix((inner + step * 0x9E3779B97F4A7C15) % 2**64) >> 40) / 2**24


def key_of(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def counted(step=0, part=0, n_parts=1, batch=32, seed=0, purpose="x"):
    place = StepRandomness(seed, 0, part, n_parts, batch, CPU, counter=torch.tensor(step))
    return place.batch_stream(purpose)


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_number_is_the_hash_of_its_place(key, step, start):
    got = hashed(torch.tensor(key), torch.tensor(step), start, 3, torch.float64)
    assert got.tolist() == [by_hand(key, step, start + i) for i in range(3)]


def test_streams_number_their_places_and_draws():
    """Example 5 of 32, with three numbers each, in the second draw for this purpose."""
    stream = counted(step=7, part=1, n_parts=8, seed=3)
    stream.uniform(2)
    wanted = [by_hand(key_of("3:train:x:1"), 7, 5 * 3 + i) for i in range(3)]
    assert stream.uniform(3)[1].tolist() == wanted


@given(st.integers(1, 70), st.data())
def test_numbers_depend_on_the_place_in_the_batch_alone(batch, data):
    n_parts = data.draw(st.integers(1, batch))
    parts = [counted(2, part, n_parts, batch).uniform(3, 2) for part in range(n_parts)]
    assert torch.equal(torch.cat(parts), counted(2, batch=batch).uniform(3, 2))


def test_every_address_has_its_own_numbers():
    same = counted()
    variants = [counted(), counted(step=1), counted(seed=1), counted(purpose="y"), same, same]
    drawn = [stream.uniform(5) for stream in variants]
    assert torch.equal(drawn[0], drawn[4])
    for a, b in itertools.combinations([*drawn[:4], drawn[5]], 2):
        assert not torch.isin(a, b).any()


def test_the_shared_row_is_the_same_on_every_rank():
    rows = [
        StepRandomness(0, 2, rank, 3, 10, CPU, counter=torch.tensor(2)).shared_stream("x")
        for rank in range(3)
    ]
    first, *others = (row.uniform(4) for row in rows)
    assert first.shape == (1, 4) and all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("lag", [1, 7, 1000])
def test_they_are_uniform_and_independent(lag):
    drawn = counted(batch=20_000).uniform(50).flatten().double()
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-3
    pairs = torch.stack([drawn[:-lag], drawn[lag:]]).mul(16).long()
    counts = torch.bincount(pairs[0] * 16 + pairs[1], minlength=256)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    later = counted(step=lag, batch=20_000).uniform(50).flatten().double()
    assert abs(torch.corrcoef(torch.stack([drawn, later]))[0, 1]) < 5e-3


@given(st.integers(-5, 5), st.integers(1, 40))
def test_integers_cover_their_range(low, width):
    drawn = counted(batch=2000).integers(low, low + width, 4)
    assert drawn.dtype == torch.long and drawn.shape == (2000, 4)
    assert set(drawn.unique().tolist()) == set(range(low, low + width))


def test_a_part_asks_for_as_many_rows_as_it_has():
    stream = counted(part=1, n_parts=3, batch=10)
    assert isinstance(stream, CountedStream) and stream.uniform().shape == (3,)
