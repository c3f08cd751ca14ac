"""Counts of pairs that were met, in memory for those that were; adding them is order-free."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Counts:
    """`pairs` (a, b) as a * 2^32 + b, rising, each once; `counts` how often."""

    pairs: Int[np.ndarray, "n"]
    counts: Int[np.ndarray, "n"]

    @property
    def a(self) -> Int[np.ndarray, "n"]:
        return (self.pairs >> 32).astype(np.int32)

    @property
    def b(self) -> Int[np.ndarray, "n"]:
        return (self.pairs & 0xFFFFFFFF).astype(np.int32)


def count(
    a: Int[np.ndarray, "m"], b: Int[np.ndarray, "m"], weights: Int[np.ndarray, "m"] | None
) -> Counts:
    """Pairs of two columns; each row counts once, or `weights` times."""
    return _added((a.astype(np.int64) << 32) + b, weights)


def total(parts: Sequence[Counts]) -> Counts:
    return _added(
        np.concatenate([part.pairs for part in parts]),
        np.concatenate([part.counts for part in parts]),
    )


def _added(pairs: Int[np.ndarray, "m"], weights: Int[np.ndarray, "m"] | None) -> Counts:
    if weights is None:
        return Counts(*np.unique(pairs, return_counts=True))
    unique, inverse = np.unique(pairs, return_inverse=True)
    counts = np.zeros(len(unique), np.int64)
    np.add.at(counts, inverse, weights)
    return Counts(unique, counts)
