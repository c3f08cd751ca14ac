from unittest.mock import patch

import pytest
import torch
from test_distributed import free_port
from torch import nn
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn
from torch.utils.checkpoint import checkpoint

from spd_core import distributed
from spd_core.distributed import Dist
from spd_core.fast import overlap

N = 6


def gradients(dist, bucket):
    """Of sums of p_i x[: i + 1] with x = 0, 1, ... + rank, added to ones that were there before.

    They come in an order of each rank's own, and two parameters have none. Beside them, how many
    sums had begun when backward() ended.
    """
    parameters = [nn.Parameter(torch.zeros(i + 1)) for i in range(N)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    parameters.insert(2, nn.Parameter(torch.zeros(3)))
    parameters.insert(4, nn.Parameter(torch.zeros(3), requires_grad=False))
    used = [p for p in parameters if p.grad is not None]
    used = used if dist.rank % 2 else used[::-1]
    with (
        patch.object(overlap, "BUCKET", bucket),
        patch.object(overlap, "begin_sum", wraps=distributed.begin_sum) as begin_sum,
        overlap.summed_gradients(parameters, dist),
    ):
        sums = [(p * (torch.arange(len(p)) + dist.rank)).sum() for p in used]
        torch.stack(sums).sum().backward()
        n_begun = begin_sum.call_count
    return [None if p.grad is None else p.grad.tolist() for p in parameters], n_begun


def refuse_a_gradient_in_two_parts(dist):
    p, x = nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True)
    with (
        patch.object(overlap, "BUCKET", 1),
        pytest.raises(RuntimeError, match="use_reentrant=False"),
        overlap.summed_gradients([p], dist),
    ):
        parts = [checkpoint(lambda x: (x * p).sum(), x, use_reentrant=True) for _ in range(2)]
        torch.stack(parts).sum().backward()


def rank_main(rank, world, port, buckets, queue):
    dist = distributed.init(rank, world, rank, f"127.0.0.1:{port}", "cpu")
    refuse_a_gradient_in_two_parts(dist)
    on_any_rank = overlap.AnyRank(dist)
    flags = [step == 1 and rank == world - 1 for step in range(4)]
    assert [on_any_rank(flag) for flag in flags] == [False, False, True, False]
    queue.put([gradients(dist, bucket) for bucket in buckets])
    distributed.barrier(dist)
    distributed.shutdown()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_are_summed_in_collectives_of_any_size(world):
    buckets = (1, 4, 20, 10**9)
    queue = get_context("spawn").SimpleQueue()
    spawn(rank_main, (world, free_port(), buckets, queue), nprocs=world)
    whole = [world + world * k + world * (world - 1) / 2 for k in range(N)]
    wanted = [whole[: i + 1] for i in range(N)]
    wanted = [*wanted[:2], None, wanted[2], None, *wanted[3:]]
    # Those after the parameter without a gradient; with 20 bytes 24 of the last and 20 of the last
    # but one go alone, with 10^9 all together wait for the one without.
    n_begun = (4, 4, 3, 0)
    for _ in range(world):
        assert queue.get() == [(wanted, n) for n in n_begun]


def test_one_process_sums_nothing():
    got, n_begun = gradients(Dist(0, 1, torch.device("cpu")), 1)
    assert got[:4] == [[1.0], [1.0, 2.0], None, [1.0, 2.0, 3.0]] and n_begun == 0


def test_one_process_answers_itself_at_once():
    on_any_rank = overlap.AnyRank(Dist(0, 1, torch.device("cpu")))
    assert [on_any_rank(flag) for flag in (True, False)] == [True, False]
