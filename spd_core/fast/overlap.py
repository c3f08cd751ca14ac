"""Gradients that are summed over ranks while backward() still computes others."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from spd_core.distributed import Dist, begin_sum

BUCKET = 10 * 2**20
"""Bytes at which a collective is large enough that more of them cost nothing."""


@contextmanager
def summed_gradients(parameters: Sequence[nn.Parameter], dist: Dist) -> Iterator[None]:
    """One backward() within leaves the sum over ranks in `.grad`.

    `parameters` are in the order of their first use, so that gradients come in the reverse. Those
    that follow each other share a collective, which begins when the last of them is there. Ranks
    agree on what is in it, and on the order of collectives, whatever order gradients come in.
    """
    if dist.world_size == 1:
        yield
        return
    buckets: deque[list[nn.Parameter]] = deque([[]])
    for parameter in reversed(parameters):
        if sum(p.nbytes for p in buckets[-1]) >= BUCKET:
            buckets.append([])
        buckets[-1].append(parameter)
    there, sums = set[Tensor](), []

    def begin(bucket: list[nn.Parameter]) -> None:
        if grads := {p: p.grad.flatten() for p in bucket if p.grad is not None}:
            flat = torch.cat(list(grads.values()))
            sums.append((grads, flat, begin_sum(flat)))

    def has_come(parameter: Tensor) -> None:
        there.add(parameter)
        while buckets and there.issuperset(buckets[0]):
            begin(buckets.popleft())

    with ExitStack() as hooks:
        for parameter in parameters:
            hooks.callback(parameter.register_post_accumulate_grad_hook(has_come).remove)
        yield
    for bucket in buckets:  # of parameters that no loss depends on
        begin(bucket)
    for grads, flat, work in sums:
        work.wait()
        pieces = flat.split([grad.numel() for grad in grads.values()])
        for parameter, piece in zip(grads, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
