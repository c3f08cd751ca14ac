import hashlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spd_core.fast.hashed import Draw, uniform
from spd_core.randomness import StepRandomness, stream

CPU = torch.device("cpu")


def place(part=0, n_parts=1, batch=32, seed=0, step=0, **more):
    return StepRandomness(seed, step, part, n_parts, batch, CPU, **more)


def draws(world, batch=32, seed=0, step=0, purpose="x"):
    """What all ranks draw, put together."""
    parts = []
    for rank in range(world):
        s = place(rank, world, batch, seed, step).batch_stream(purpose)
        parts.append(
            torch.cat([s.uniform(3), s.integers(0, 100, 2).float(), s.uniform()[:, None]], 1)
        )
    assert {len(part) for part in parts} <= {batch // world, -(-batch // world)}
    return torch.cat(parts)


@given(st.integers(1, 70), st.integers(0, 9), st.data())
def test_numbers_depend_on_the_place_in_the_batch_alone(batch, step, data):
    """Whatever the number of ranks or microbatches."""
    world = data.draw(st.integers(1, batch))
    assert torch.equal(draws(world, batch, step=step), draws(1, batch, step=step))


def test_some_rows_have_the_numbers_of_their_own_places():
    rows = torch.tensor([5, 0, 3])
    whole = place(1, 3).batch_stream("x").uniform(2, 4)
    assert torch.equal(place(1, 3, rows=rows).batch_stream("x").uniform(2, 4), whole[rows])


@pytest.mark.parametrize("world, batch", [(3, 10), (5, 7), (3, 96), (6, 12), (32, 64), (1, 1)])
def test_ranks_never_share_numbers_whatever_their_number(world, batch):
    rows = draws(world, batch)
    assert len(rows) == batch and len(rows[:, 0].unique()) == batch
    assert torch.equal(rows, draws(1, batch))


@given(st.integers(1, 40), st.data())
def test_ranks_cut_the_batch_without_gap_or_overlap(batch, data):
    world = data.draw(st.integers(1, batch))
    parts = [place(rank, world, batch).examples for rank in range(world)]
    assert [at for part in parts for at in part] == list(range(batch))


def test_positions_have_their_own_numbers():
    values = place(1, 3, 10).batch_stream("x").uniform(4, 5)
    assert values.shape == (3, 4, 5) and len(values.unique()) == values.numel()


def test_the_shared_stream_is_the_same_on_every_rank():
    first, *others = (place(rank, 3, 10).shared_stream("x").uniform(4) for rank in range(3))
    assert first.shape == (1, 4) and all(torch.equal(first, other) for other in others)


def test_every_address_has_its_own_numbers():
    same = place().batch_stream("x")
    others = [place(step=1), place(seed=1), place(phase="eval")]
    streams = [same, *(other.batch_stream("x") for other in others), place().batch_stream("y")]
    drawn = [s.uniform(5) for s in [*streams, same]]  # the last is a second draw of the first
    assert torch.equal(drawn[0], place().batch_stream("x").uniform(5))
    for a, b in itertools.combinations(drawn, 2):
        assert not torch.isin(a, b).any()


def test_a_key_is_the_digest_of_seed_phase_purpose_and_number_of_the_draw():
    s = place(1, 8, seed=3, step=7).batch_stream("x")
    s.uniform(2)
    key = int.from_bytes(hashlib.sha256(b"3:train:x:1").digest()[:8], "big") >> 1
    wanted = uniform(Draw(torch.tensor(key), torch.tensor(7), 4, 4, None), (3,))
    assert torch.equal(s.uniform(3), wanted)


def test_the_number_of_the_step_may_lie_on_the_device():
    given_ = place(step=-1, counter=torch.tensor(7)).batch_stream("x").uniform(3)
    assert torch.equal(given_, place(step=7).batch_stream("x").uniform(3))
    assert place(counter=torch.tensor(7)).has_fixed_shapes and not place().has_fixed_shapes


@given(st.integers(-5, 5), st.integers(1, 40))
def test_integers_cover_their_range(low, width):
    drawn = place(batch=2000).batch_stream("x").integers(low, low + width, 4)
    assert drawn.dtype == torch.long and drawn.shape == (2000, 4)
    assert set(drawn.unique().tolist()) == set(range(low, low + width))


def test_the_same_address_has_the_same_numbers_whatever_the_global_state():
    torch.manual_seed(0)
    first = draws(1)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    assert torch.equal(first, draws(1))
    assert torch.equal(state, torch.random.get_rng_state())


def test_addresses_do_not_run_together():
    a = torch.rand(4, generator=stream(1, "p", 11, device=CPU))
    b = torch.rand(4, generator=stream(1, "p", 1, 1, device=CPU))
    assert not torch.equal(a, b)
