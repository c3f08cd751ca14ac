"""Ranks and collectives: the only file that knows torch.distributed.

Convention for losses: each rank returns its (sum, count); the value is sum over ranks divided by
count over ranks, and gradients are SUMMED over ranks.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as torch_dist
from jaxtyping import Float
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
    rank: int,
    world_size: int,
    local_rank: int,
    master_addr: str,
    master_port: int,
    device: Literal["auto", "cpu", "cuda"],
) -> Dist:
    """Join the process group (none for one process) on gloo or nccl.

    Raises:
        ValueError: device is "cuda" and torch sees no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "train.device=cuda, but torch sees no GPU; use train.device=cpu, or cluster=cpu"
        )
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_cuda:
        # With one visible GPU per task the local rank does not index the visible list.
        index = local_rank % torch.cuda.device_count()
        torch.cuda.set_device(index)
        torch_device = torch.device("cuda", index)
    else:
        torch_device = torch.device("cpu")
    if world_size > 1:
        os.environ["MASTER_ADDR"] = master_addr
        os.environ["MASTER_PORT"] = str(master_port)
        torch_dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=10),
        )
    return Dist(rank, world_size, torch_device)


def shutdown() -> None:
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def all_sum(tensor: Float[Tensor, "..."], dist: Dist) -> Float[Tensor, "..."]:
    """Sum over ranks; a new tensor, detached."""
    result = tensor.detach().clone()
    if dist.world_size > 1:
        torch_dist.all_reduce(result)
    return result


def all_sum_with_grad(tensor: Float[Tensor, "..."], dist: Dist) -> Float[Tensor, "..."]:
    """Sum over ranks whose gradient reaches this rank's part.

    The gradient is scaled by world_size because a value that is whole on every rank is divided by
    the summed count (see the convention above).
    """
    if dist.world_size == 1:
        return tensor
    return all_sum(tensor, dist) + dist.world_size * (tensor - tensor.detach())


def sum_gradients(parameters: Iterable[torch.nn.Parameter], dist: Dist) -> None:
    """Sum `.grad` over ranks in one flattened collective."""
    if dist.world_size == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    torch_dist.all_reduce(flat)
    for grad, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


def broadcast(tensor: Tensor, dist: Dist) -> None:
    """Make the tensor rank 0's, in place."""
    if dist.world_size > 1:
        torch_dist.broadcast(tensor, 0)


def any_rank(flag: bool, dist: Dist) -> bool:
    """Whether the flag is set on at least one rank; the same answer on all."""
    if dist.world_size == 1:
        return flag
    tensor = torch.tensor(float(flag), device=dist.device)
    torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MAX)
    return bool(tensor.item())


def barrier(dist: Dist) -> None:
    if dist.world_size > 1:
        torch_dist.barrier()
