"""Random numbers that are hashes of their own places: one kernel makes them, from a step's number
that only the device knows.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_core.fast.fused import fused

GAMMA = 0x9E3779B97F4A7C15 - 2**64


def digest(*address: int | str) -> int:
    """63 bits, which generators of CPUs and GPUs take as a seed."""
    whole = hashlib.sha256(":".join(map(str, address)).encode()).digest()
    return int.from_bytes(whole[:8], "big") >> 1


class Draw(NamedTuple):
    """What `hashed` makes U[0, 1) from, for n rows of the global batch from the row `first` on."""

    key: Int[Tensor, ""]
    step: Int[Tensor, ""]
    first: int
    n: int


@dataclass
class CountedStream:
    """As BatchStream, with numbers that are hashed from their places."""

    address: tuple[int | str, ...]
    step: Int[Tensor, ""]
    first: int
    n: int
    n_draws: int = 0

    def next(self) -> Draw:
        key = digest(*self.address, self.n_draws)
        self.n_draws += 1
        # Filled, not copied from the host: a copy waits for the device.
        return Draw(torch.full_like(self.step, key), self.step, self.first, self.n)

    def uniform(self, *shape: int) -> Float[Tensor, "batch *rest"]:
        """U[0, 1) of shape (batch of this rank, *shape), in steps of 2^-24."""
        (key, step, first, n), width = self.next(), math.prod(shape)
        draw, dtype = fused(hashed, key.device), torch.get_default_dtype()
        return draw(key, step, first * width, n * width, dtype).view(n, *shape)

    def integers(self, low: int, high: int, *shape: int) -> Int[Tensor, "batch *rest"]:
        """Integers in [low, high) of that shape, uniform where these are far fewer than 2^24."""
        return low + (self.uniform(*shape) * (high - low)).long()


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
