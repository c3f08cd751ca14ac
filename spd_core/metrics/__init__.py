"""What metrics add up over batches."""

from fnmatch import fnmatchcase

from torch import Tensor

Sums = dict[str, Tensor]
"""Sums by name; those that become a mean are pairs, (sum, count)."""


def add(sums: Sums, part: Sums) -> None:
    """Add the part of one batch to `sums`, in place."""
    for name, value in part.items():
        sums[name] = sums[name] + value if name in sums else value


def means(pairs: Sums) -> dict[str, float]:
    return {name: (pair[0] / pair[1]).item() for name, pair in pairs.items()}


def matching(names: list[str], patterns: list[str]) -> list[str]:
    """The module paths that some fnmatch pattern matches."""
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]
