"""What metrics add up over batches and ranks."""

from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from spd_core.distributed import Dist

Sums = dict[str, Tensor]
"""Sums by name; those that become a mean are pairs, (sum, count)."""


def add(sums: Sums, part: Sums) -> None:
    """Add the part of one batch to `sums`, in place."""
    for name, value in part.items():
        sums[name] = sums[name] + value if name in sums else value


def over_ranks(reduce: Callable[[Tensor, Dist], Tensor], parts: Sums, dist: Dist) -> Sums:
    """The parts of all ranks, reduced in one collective."""
    if not parts:
        return {}
    flat = reduce(torch.cat([part.flatten() for part in parts.values()]), dist)
    pieces = flat.split([part.numel() for part in parts.values()])
    return {n: t.clone().view_as(p) for (n, p), t in zip(parts.items(), pieces, strict=True)}


def means(pairs: Sums) -> dict[str, float]:
    return {name: (pair[0] / pair[1]).item() for name, pair in pairs.items()}


def matching(names: list[str], patterns: list[str]) -> list[str]:
    """The module paths that some fnmatch pattern matches."""
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]
