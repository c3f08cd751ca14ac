"""Random numbers addressed by (seed, purpose, step, place), never by ambient state.

What an example sees depends on its place in the global batch alone, not on a restart, the number
of ranks, microbatches or the kind of device.
"""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_core.fast.hashed import Draw, uniform


def stream(seed: int, purpose: str, *address: int, device: torch.device) -> torch.Generator:
    """A generator whose numbers depend on its arguments alone."""
    return torch.Generator(device).manual_seed(_digest(seed, purpose, *address))


def _digest(*address: int | str) -> int:
    """63 bits, which generators of CPUs and GPUs take as a seed."""
    whole = hashlib.sha256(":".join(map(str, address)).encode()).digest()
    return int.from_bytes(whole[:8], "big") >> 1


@dataclass
class Stream:
    """The numbers of one purpose for one rank's part of one batch; every draw has its own."""

    address: tuple[int | str, ...]
    step: Int[Tensor, ""]
    first: int
    n: int
    rows: Int[Tensor, "n_rows"] | None
    n_draws: int = 0

    def next(self) -> Draw:
        key = _digest(*self.address, self.n_draws)
        self.n_draws += 1
        # Filled, not copied from the host: a copy waits for the device.
        return Draw(torch.full_like(self.step, key), self.step, self.first, self.n, self.rows)

    def uniform(self, *shape: int) -> Float[Tensor, "batch *rest"]:
        """U[0, 1) of shape (batch of this rank, *shape), in steps of 2^-24."""
        return uniform(self.next(), shape)

    def integers(self, low: int, high: int, *shape: int) -> Int[Tensor, "batch *rest"]:
        """Integers in [low, high) of that shape, uniform where these are far fewer than 2^24."""
        return low + (self.uniform(*shape) * (high - low)).long()


@dataclass(frozen=True)
class StepRandomness:
    """Where the random numbers of one step come from, in one of equal parts of the batch.

    A part is a rank's share, or one of its microbatches. Phases never share numbers. Some `rows` of
    a part see those of their own places. `counter`: the step's number, if only the device knows it.
    """

    seed: int
    step: int
    part: int
    n_parts: int
    batch_size: int
    device: torch.device
    phase: str = "train"
    rows: Int[Tensor, "n"] | None = None
    counter: Int[Tensor, ""] | None = None

    @property
    def has_fixed_shapes(self) -> bool:
        """Whether no shape may depend on a number: a GPU would have to be waited for."""
        return self.counter is not None or self.device.type == "cuda"

    @property
    def examples(self) -> range:
        """The places of this part in the global batch, cut into nearly equal parts."""
        size, n_parts = self.batch_size, self.n_parts
        return range(self.part * size // n_parts, (self.part + 1) * size // n_parts)

    def batch_stream(self, purpose: str) -> Stream:
        return self._stream(purpose, self.examples, self.rows)

    def shared_stream(self, purpose: str) -> Stream:
        """One row for this step, the same on every rank."""
        return self._stream(purpose, range(1), None)

    def _stream(self, purpose: str, places: range, rows: Tensor | None) -> Stream:
        step = self.counter
        if step is None:
            step = torch.full((), self.step, device=self.device)
        address = self.seed, f"{self.phase}:{purpose}"
        return Stream(address, step, places.start, len(places), rows)
