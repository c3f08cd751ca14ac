import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spd_core.randomness import StepRandomness, stream

CPU = torch.device("cpu")


def draws(world, batch=32, seed=0, step=0, purpose="x"):
    """What all ranks draw, put together."""
    parts = []
    for rank in range(world):
        s = StepRandomness(seed, step, rank, world, batch, CPU).batch_stream(purpose)
        parts.append(
            torch.cat([s.uniform(3), s.integers(0, 100, 2).float(), s.uniform()[:, None]], 1)
        )
    assert {len(part) for part in parts} <= {batch // world, -(-batch // world)}
    return torch.cat(parts)


@given(st.integers(1, 70), st.integers(0, 9), st.data())
def test_numbers_depend_on_the_place_in_the_batch_alone(batch, step, data):
    """Whatever the number of ranks or microbatches, and wherever they cut the shards."""
    world = data.draw(st.integers(1, batch))
    assert torch.equal(draws(world, batch, step=step), draws(1, batch, step=step))


@pytest.mark.parametrize("world, batch", [(3, 10), (5, 7), (3, 96), (6, 12), (32, 64), (1, 1)])
def test_ranks_never_share_numbers_whatever_their_number(world, batch):
    rows = draws(world, batch)
    assert len(rows) == batch and len(rows[:, 0].unique()) == batch
    assert torch.equal(rows, draws(1, batch))


@given(st.integers(1, 40), st.data())
def test_ranks_cut_the_batch_without_gap_or_overlap(batch, data):
    world = data.draw(st.integers(1, batch))
    parts = [StepRandomness(0, 0, rank, world, batch, CPU).examples for rank in range(world)]
    assert [place for part in parts for place in part] == list(range(batch))


def test_positions_have_their_own_numbers():
    values = StepRandomness(0, 0, 1, 3, 10, CPU).batch_stream("x").uniform(4, 5)
    assert values.shape == (3, 4, 5) and len(values.unique()) == values.numel()


def test_the_shared_stream_is_the_same_on_every_rank():
    first, *others = (
        StepRandomness(0, 2, rank, 3, 10, CPU).shared_stream("x").uniform(4) for rank in range(3)
    )
    assert all(torch.equal(first, other) for other in others)
    own = StepRandomness(0, 2, 0, 3, 10, CPU).batch_stream("x").uniform(4)
    assert not torch.isin(first, own).any()


def test_every_address_has_its_own_numbers():
    variants = [draws(1), draws(1, seed=1), draws(1, step=1), draws(1, purpose="y")]
    values = torch.cat([v[:, :3].flatten() for v in variants])
    # 24 bits of a float: of 384 draws a repetition has probability 0.4 %.
    assert len(values.unique()) >= len(values) - 1


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
