import socket

import pytest
import torch
from torch import nn
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn

from spd_core import distributed
from spd_core.distributed import Dist
from spd_core.fast import overlap

N = 6


def gradients(dist, bucket):
    """Of sums of p_i x[: i + 1] with x = 0, 1, ... + rank, added to ones that were there before.

    They come in an order of each rank's own, and one parameter has none.
    """
    overlap.BUCKET = bucket
    parameters = [nn.Parameter(torch.zeros(i + 1)) for i in range(N)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    parameters.insert(2, nn.Parameter(torch.zeros(3)))
    used = [p for p in parameters if p.grad is not None]
    used = used if dist.rank % 2 else used[::-1]
    with overlap.summed_gradients(parameters, dist):
        sums = [(p * (torch.arange(len(p)) + dist.rank)).sum() for p in used]
        torch.stack(sums).sum().backward()
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def rank_main(rank, world, port, buckets, queue):
    dist = distributed.init(rank, world, rank, f"127.0.0.1:{port}", "cpu")
    queue.put([gradients(dist, bucket) for bucket in buckets])
    distributed.barrier(dist)
    distributed.shutdown()


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_are_summed_in_collectives_of_any_size(world):
    buckets = (1, 4, 20, 10**9)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    queue = get_context("spawn").SimpleQueue()
    spawn(rank_main, (world, port, buckets, queue), nprocs=world)
    whole = [world + world * k + world * (world - 1) / 2 for k in range(N)]
    wanted = [*(whole[: i + 1] for i in range(2)), None, *(whole[: i + 1] for i in range(2, N))]
    for _ in range(world):
        assert queue.get() == [wanted] * len(buckets)


def test_one_process_sums_nothing():
    got = gradients(Dist(0, 1, torch.device("cpu")), 1)
    assert got == [[1.0], [1.0, 2.0], None, *([1.0 + k for k in range(i + 1)] for i in range(2, N))]
