"""Ranks and collectives: the only file that knows torch.distributed.

Convention for losses: each rank returns its (sum, count); the value is sum over ranks divided by
count over ranks, and gradients are SUMMED over ranks.

A rank that fails leaves the others waiting; who started them ends them (`spd_launch.peers`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as torch_dist

# Optimisers import it, and imported within a group it keeps that to the end, with threads that
# may bring the process down as Python ends.
import torch.distributed.nn.functional
from torch import Tensor


@dataclass(frozen=True)
class Dist:
    """Where this process stands among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(
    rank: int, world_size: int, local_rank: int, master: str, device: Literal["auto", "cpu", "cuda"]
) -> Dist:
    """Join the process group (none for one process) on gloo or nccl, at HOST:PORT."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device=cuda, but torch sees no GPU; train.device=cpu needs none")
    place, use_cuda = torch.device("cpu"), device != "cpu" and torch.cuda.is_available()
    if use_cuda:
        # With one visible GPU per task the local rank does not index the visible list.
        place = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
    if world_size > 1:
        backend, limit = "nccl" if use_cuda else "gloo", timedelta(minutes=10)
        torch_dist.init_process_group(backend, f"tcp://{master}", limit, world_size, rank)
    return Dist(rank, world_size, place)


def shutdown() -> None:
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def all_reduce(op: Literal["sum", "min"], tensor: Tensor, dist: Dist) -> Tensor:
    """The sum over ranks or the elementwise minimum; a new tensor, detached."""
    result = tensor.detach().clone()
    if dist.world_size > 1:
        ops = {"sum": torch_dist.ReduceOp.SUM, "min": torch_dist.ReduceOp.MIN}
        torch_dist.all_reduce(result, ops[op])
    return result


def over_ranks(
    op: Literal["sum", "min"], parts: Mapping[Any, Tensor], dist: Dist
) -> dict[Any, Tensor]:
    """`all_reduce` of all parts in one collective."""
    if not parts:
        return {}
    flat = all_reduce(op, torch.cat([part.flatten() for part in parts.values()]), dist)
    pieces = flat.split([part.numel() for part in parts.values()])
    return {n: t.clone().view_as(p) for (n, p), t in zip(parts.items(), pieces, strict=True)}


def begin_sum(tensor: Tensor) -> torch_dist.Work:
    """Begin to sum the tensor over ranks, in place; its wait() ends that."""
    return cast(torch_dist.Work, torch_dist.all_reduce(tensor, async_op=True))


def broadcast(tensor: Tensor, dist: Dist) -> None:
    """Make the tensor rank 0's, in place."""
    if dist.world_size > 1:
        torch_dist.broadcast(tensor, 0)


def any_rank(flag: bool, dist: Dist) -> bool:
    """Whether the flag is set on at least one rank; the same answer on all."""
    if dist.world_size == 1:
        return flag
    return bool(all_reduce("sum", torch.tensor(float(flag), device=dist.device), dist))


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def barrier(dist: Dist) -> None:
    if dist.world_size > 1:
        torch_dist.barrier()
