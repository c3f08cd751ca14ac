"""The examples of largest importance of each subcomponent, in bounded memory.

Examples are compared by a key: the importance, then a number that is different for each position
and looks random. So they have one order, whatever order they are met in, and among equal
importances (many are exactly 1) those that are kept come from everywhere.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BITS = 31  # of the number of a position

Rows = dict[str, np.ndarray]
"""Columns of equal length: subcomponent, key, example (its number in the whole harvest), position;
importances (n, window), and tokens (n, window) or inputs (n, n_features). Outside of a sequence a
window holds -1."""


def scrambled(numbers: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """A one-to-one map of [0, 2^31) onto itself."""
    mask = 2**BITS - 1
    for factor, shift in ((0x2C1B3C6D, 15), (0x297A2D39, 16)):  # odd factors, so none meet
        numbers = (numbers * factor) & mask
        numbers = numbers ^ (numbers >> shift)
    return numbers


def importance_of(keys: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    return (keys >> BITS).astype(np.int32).view(np.float32)


def candidates(
    ci: Float[Tensor, "samples C"],
    first_position: int,
    threshold: float,
    k: int,
    to_beat: Int[Tensor, "C"],
) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"], Int[Tensor, "n"]]:
    """Of each subcomponent the k largest keys of a batch, of those above `to_beat`.

    Returns the subcomponents, the samples of the batch, and the keys. The order of non-negative
    floats is that of their bits.
    """
    numbers = first_position + torch.arange(len(ci), device=ci.device)
    keys = (ci.contiguous().view(torch.int32).long() << BITS) + scrambled(numbers)[:, None]
    keys = torch.where(ci > threshold, keys, -1)
    keys, samples = keys.topk(min(k, len(keys)), dim=0)
    better = keys > to_beat
    return better.nonzero()[:, 1], samples[better], keys[better]


def windows(
    values: Float[Tensor, "batch seq"] | Int[Tensor, "batch seq"],
    rows: Int[Tensor, "n"],
    positions: Int[Tensor, "n"],
    reach: int,
) -> Tensor:
    """`reach` values on each side of a position; -1 where the sequence does not go so far."""
    places = positions[:, None] + torch.arange(-reach, reach + 1, device=positions.device)
    inside = (places >= 0) & (places < values.shape[1])
    return torch.where(inside, values[rows[:, None], places.clamp(0, values.shape[1] - 1)], -1)


def best(parts: Sequence[Rows], k: int) -> Rows:
    """The k rows of largest key of each subcomponent, sorted."""
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((-rows["key"], rows["subcomponent"]))
    who = rows["subcomponent"][order]
    starts = np.searchsorted(who, who)  # of each one's own rows
    order = order[np.arange(len(who)) - starts < k]
    return {name: column[order] for name, column in rows.items()}
