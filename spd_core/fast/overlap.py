"""What ranks tell each other while they compute: gradients, and whether to stop."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from spd_core.distributed import Dist, all_reduce, begin_sum

BUCKET = 10 * 2**20
"""A collective is of at least so many bytes, but for the last one."""


@contextmanager
def summed_gradients(parameters: Sequence[nn.Parameter], dist: Dist) -> Iterator[None]:
    """One backward() within leaves the sum over ranks in `.grad`.

    Neighbours among `parameters` share a collective, which begins when all their gradients, and
    those of all later parameters, are there. It is fastest if the first used come first. The same
    parameters must have gradients on all ranks, in whatever order these come.

    Raises:
        RuntimeError: a gradient grew after its sum had begun.
    """
    if dist.world_size == 1:
        yield
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    buckets: deque[list[nn.Parameter]] = deque([[]])
    for parameter in reversed(trained):
        if sum(p.nbytes for p in buckets[-1]) >= BUCKET:
            buckets.append([])
        buckets[-1].append(parameter)
    there, sums = set[Tensor](), []

    def begin(bucket: list[nn.Parameter]) -> None:
        if grads := {p: p.grad.flatten() for p in bucket if p.grad is not None}:
            flat = torch.cat(list(grads.values()))
            for parameter in grads:
                parameter.grad = None  # its memory is free for others
            sums.append((list(grads), flat, begin_sum(flat)))

    def has_come(parameter: Tensor) -> None:
        there.add(parameter)
        while buckets and there.issuperset(buckets[0]):
            begin(buckets.popleft())

    with ExitStack() as hooks:
        for parameter in trained:
            hooks.callback(parameter.register_post_accumulate_grad_hook(has_come).remove)
        yield
    for bucket in buckets:  # of parameters that no loss depends on
        begin(bucket)
    for of_bucket, flat, work in sums:
        work.wait()
        pieces = flat.split([parameter.numel() for parameter in of_bucket])
        for parameter, piece in zip(of_bucket, pieces, strict=True):
            if parameter.grad is not None:
                raise RuntimeError(
                    "a gradient came in two parts, as reentrant checkpointing gives them, and the "
                    "first was summed over ranks already; checkpoint with use_reentrant=False"
                )
            parameter.grad = piece.view_as(parameter)


class AnyRank:
    """Whether a flag is set on at least one rank; the same answer on all.

    Where there are others it is about the flags of the call before: by then a GPU has more to do,
    so that it never waits for the host's next step.
    """

    def __init__(self, dist: Dist) -> None:
        self.dist, self.n_set = dist, torch.zeros(())
        self.is_there = torch.cuda.Event() if dist.device.type == "cuda" else None

    def __call__(self, flag: bool) -> bool:
        if self.dist.world_size == 1:
            return flag
        if self.is_there is not None:
            self.is_there.synchronize()
        answer = bool(self.n_set)
        own = torch.full((), float(flag), device=self.dist.device)
        self.n_set = all_reduce("sum", own, self.dist).to("cpu", non_blocking=True)
        if self.is_there is not None:
            self.is_there.record()
        return answer
