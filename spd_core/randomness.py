"""Random streams addressed by (seed, purpose, step, place), never by ambient state.

What an example sees depends on its place in the global batch alone, not on a restart, the number
of ranks, or microbatches. On a CPU the batch is cut into shards with a generator each, and a rank
draws the shards that its own examples lie in. On a GPU a number is a hash of its own place, so that
one kernel makes them, and the host need not know the step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_core.fast.counted import CountedStream, digest

N_SHARDS = 16


def stream(seed: int, purpose: str, *address: int, device: torch.device) -> torch.Generator:
    """A generator whose numbers depend on its arguments alone."""
    return torch.Generator(device).manual_seed(digest(seed, purpose, *address))


@dataclass(frozen=True)
class BatchStream:
    """The streams of one rank's part of one batch, for one purpose.

    `shards` are generators with the number of examples that each draws; `rows` are those wanted.
    """

    shards: list[tuple[torch.Generator, int]]
    rows: slice | Int[Tensor, "n"]

    def uniform(self, *shape: int) -> Float[Tensor, "batch *rest"]:
        """U[0, 1) of shape (batch of this rank, *shape)."""
        return self._draw(torch.get_default_dtype(), shape, lambda x, g: x.uniform_(generator=g))

    def integers(self, low: int, high: int, *shape: int) -> Int[Tensor, "batch *rest"]:
        """Uniform integers in [low, high) of shape (batch of this rank, *shape)."""
        return self._draw(torch.long, shape, lambda x, g: x.random_(low, high, generator=g))

    def _draw(
        self, dtype: torch.dtype, shape: tuple[int, ...], fill: Callable[[Tensor, Any], Tensor]
    ) -> Tensor:
        numbers = [n for _, n in self.shards]
        drawn = torch.empty(sum(numbers), *shape, dtype=dtype, device=self.shards[0][0].device)
        for part, (generator, _) in zip(drawn.split(numbers), self.shards, strict=True):
            fill(part, generator)
        rows = self.rows
        return drawn[rows] if isinstance(rows, slice) else drawn.index_select(0, rows)


Stream = BatchStream | CountedStream


@dataclass(frozen=True)
class StepRandomness:
    """Where the random numbers of one step come from, in one of equal parts of the batch.

    A part is a rank's share, or one of its microbatches. Phases never share numbers. Where only
    some rows of the part are looked at, they see the numbers of their own places. With `counter`,
    the step's number on the device, numbers are counted; on a GPU they are in any case.
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
    def is_counted(self) -> bool:
        """Whether the device is not waited for, so that no shape may depend on its numbers."""
        return self.counter is not None or self.device.type == "cuda"

    @property
    def examples(self) -> range:
        """The places of this part in the global batch."""
        return _cut(self.part, self.n_parts, self.batch_size)

    def batch_stream(self, purpose: str) -> Stream:
        start, stop = self.examples.start, self.examples.stop
        if self.is_counted:
            return self._counted(purpose, start, stop - start)
        cuts = {i: _cut(i, N_SHARDS, self.batch_size) for i in range(N_SHARDS)}
        touched = {i: c for i, c in cuts.items() if max(c.start, start) < min(c.stop, stop)}
        shards = [(self._generator(f"{purpose}:{i}"), len(c)) for i, c in touched.items()]
        first = start - min(c.start for c in touched.values())
        rows = slice(first, first + stop - start) if self.rows is None else first + self.rows
        return BatchStream(shards, rows)

    def shared_stream(self, purpose: str) -> Stream:
        """One row for this step, the same on every rank."""
        if self.is_counted:
            return self._counted(purpose, 0, 1)
        return BatchStream([(self._generator(purpose), 1)], slice(None))

    def _generator(self, purpose: str) -> torch.Generator:
        return stream(self.seed, f"{self.phase}:{purpose}", self.step, device=self.device)

    def _counted(self, purpose: str, first: int, n: int) -> CountedStream:
        step = self.counter
        if step is None:
            step = torch.full((), self.step, device=self.device)
        return CountedStream((self.seed, f"{self.phase}:{purpose}"), step, first, n)


def _cut(i: int, n: int, size: int) -> range:
    """Part i of n nearly equal parts of range(size)."""
    return range(i * size // n, (i + 1) * size // n)
