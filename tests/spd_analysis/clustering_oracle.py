"""What clustering must agree with, written without it: slow, and over whole partitions."""

import math
from collections.abc import Iterator

import numpy as np

from spd_analysis.clustering.activations import Activations

Partition = list[list[int]]


def partitions(n: int) -> Iterator[Partition]:
    """All partitions of range(n)."""
    if n == 0:
        yield []
        return
    for smaller in partitions(n - 1):
        for i in range(len(smaller)):
            yield [*smaller[:i], [*smaller[i], n - 1], *smaller[i + 1 :]]
        yield [*smaller, [n - 1]]


def description_length(values: np.ndarray, partition: Partition, alpha: float) -> float:
    """values: (samples, n) of 0 and 1, or importances; a group has its largest member's."""
    k, total = len(partition), 0.0
    for group in partition:
        s = float(values[:, group].max(axis=1).mean(dtype=np.float64))
        total += s * (math.log2(k) + alpha * len(group))
    return total


def as_partition(labels: np.ndarray) -> Partition:
    return [np.flatnonzero(labels == g).tolist() for g in np.unique(labels)]


def random_active(n_samples: int, n: int, seed: int) -> np.ndarray:
    """(samples, n) of 0 and 1; some fire often and some rarely, and neighbours often together."""
    rng = np.random.default_rng(seed)
    active = rng.random((n_samples, n)) < rng.uniform(0.02, 0.6, n)
    active[:, 1::2] |= active[:, : n - n % 2 : 2] & (rng.random((n_samples, n // 2)) < 0.7)
    return active.astype(int)


def binary(active: np.ndarray) -> Activations:
    """Bits packed here by hand: sample 64 w + 8 b + m is bit 7 - m of byte b of word w."""
    n_samples, n = active.shape
    words = np.zeros((-(-n_samples // 64), n), np.uint64)
    for sample, row in enumerate(active):
        word, place = divmod(sample, 64)
        octet, bit = divmod(place, 8)
        words[word] |= row.astype(np.uint64) << np.uint64(8 * octet + 7 - bit)
    return Activations("binary", words, n_samples, [f"m:{i}" for i in range(n)], 0)


def raw(values: np.ndarray) -> Activations:
    n_samples, n = values.shape
    names = [f"m:{i}" for i in range(n)]
    return Activations("raw", values.astype(np.float32), n_samples, names, 0)
