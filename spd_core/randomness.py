"""Random streams addressed by (seed, purpose, step, shard), never by ambient state.

The global batch is cut into shards with a stream each, and a rank draws the shards that its own
examples lie in: what an example sees depends on its place in the global batch alone, not on a
restart, the number of ranks, or microbatches.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

N_SHARDS = 16


def stream(seed: int, purpose: str, *address: int, device: torch.device) -> torch.Generator:
    """A generator whose numbers depend on its arguments alone."""
    text = ":".join([str(seed), purpose, *map(str, address)])
    digest = hashlib.sha256(text.encode()).digest()
    # CUDA and CPU generators both take 63 bits.
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


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


@dataclass(frozen=True)
class StepRandomness:
    """Where the random numbers of one step come from, in one of equal parts of the batch.

    A part is a rank's share, or one of its microbatches. Phases never share numbers. Where only
    some rows of the part are looked at, they see the numbers of their own places.
    """

    seed: int
    step: int
    part: int
    n_parts: int
    batch_size: int
    device: torch.device
    phase: str = "train"
    rows: Int[Tensor, "n"] | None = None

    @property
    def examples(self) -> range:
        """The places of this part in the global batch."""
        return _cut(self.part, self.n_parts, self.batch_size)

    def batch_stream(self, purpose: str) -> BatchStream:
        start, stop = self.examples.start, self.examples.stop
        cuts = {i: _cut(i, N_SHARDS, self.batch_size) for i in range(N_SHARDS)}
        touched = {i: c for i, c in cuts.items() if max(c.start, start) < min(c.stop, stop)}
        shards = [(self.shared_stream(f"{purpose}:{i}"), len(c)) for i, c in touched.items()]
        first = start - min(c.start for c in touched.values())
        rows = slice(first, first + stop - start) if self.rows is None else first + self.rows
        return BatchStream(shards, rows)

    def shared_stream(self, purpose: str) -> torch.Generator:
        """One stream for this step, the same on every rank."""
        return stream(self.seed, f"{self.phase}:{purpose}", self.step, device=self.device)


def _cut(i: int, n: int, size: int) -> range:
    """Part i of n nearly equal parts of range(size)."""
    return range(i * size // n, (i + 1) * size // n)
