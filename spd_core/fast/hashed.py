"""Random numbers that are hashes of their own places: one loop or kernel makes them, from a step's
number that only the device need know.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_core.fast import native
from spd_core.fast.fused import fused

GAMMA = 0x9E3779B97F4A7C15 - 2**64


class Draw(NamedTuple):
    """What numbers are made from, for n rows of the global batch from the row `first` on.

    With `rows`, counted from there, only for these.
    """

    key: Int[Tensor, ""]
    step: Int[Tensor, ""]
    first: int
    n: int
    rows: Int[Tensor, "n_rows"] | None


def uniform(draw: Draw, shape: tuple[int, ...]) -> Float[Tensor, "rows *shape"]:
    """U[0, 1) in steps of 2^-24, of the default dtype."""
    (key, step, first, n, rows), width = draw, math.prod(shape)
    dtype, device = torch.get_default_dtype(), key.device
    if native.has_loops(device, dtype):
        rows = torch.arange(n) if rows is None else rows
        numbers = native.hashed(int(key), int(step) * GAMMA, first + rows, width)
    else:
        numbers = fused(hashed, device)(key, step, first * width, n * width, dtype).view(n, width)
        numbers = numbers if rows is None else numbers[rows]
    return numbers.view(-1, *shape)


def hashed(
    key: Int[Tensor, ""], step: Int[Tensor, ""], start: int, n: int, dtype: torch.dtype
) -> Float[Tensor, "n"]:
    """The top 24 bits of mix(mix(key + i) + step gamma) for n places i from `start` on.

    mix and gamma are those of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA), modulo 2^64.
    """
    # The key first: a compiler may take places alone for 32-bit numbers.
    bits = _mix(_mix(torch.arange(n, device=key.device) + (key + start)) + step * GAMMA)
    return ((bits >> 40) & 0xFFFFFF).to(dtype) * 2.0**-24


def _mix(z: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    # Signed shifts copy the sign, which the mask takes off again.
    z = (z ^ ((z >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return z ^ ((z >> 31) & (2**33 - 1))
