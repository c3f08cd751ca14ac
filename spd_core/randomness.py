"""Random streams addressed by (seed, purpose, step, shard), never by ambient state.

The global batch is cut into equal shards with a stream each, and a rank draws for its own shards
only: what an example sees depends on its place in the global batch, not on a restart, and not on
dp as long as dp divides the 16 shards (another dp cuts finer, with numbers of its own).
"""

import hashlib
import math
from dataclasses import dataclass

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
    """The streams of one rank's part of one batch, for one purpose."""

    generators: list[torch.Generator]
    shard_size: int

    def uniform(self, *shape: int) -> Float[Tensor, "batch *rest"]:
        """U[0, 1) of shape (batch of this rank, *shape)."""
        return torch.cat(
            [
                torch.rand(self.shard_size, *shape, generator=g, device=g.device)
                for g in self.generators
            ]
        )

    def integers(self, low: int, high: int, *shape: int) -> Int[Tensor, "batch *rest"]:
        """Uniform integers in [low, high) of shape (batch of this rank, *shape)."""
        return torch.cat(
            [
                torch.randint(low, high, (self.shard_size, *shape), generator=g, device=g.device)
                for g in self.generators
            ]
        )


@dataclass(frozen=True)
class StepRandomness:
    """Where the random numbers of one step come from, on one rank."""

    seed: int
    step: int
    rank: int
    world_size: int
    batch_size: int
    device: torch.device

    def batch_stream(self, purpose: str) -> BatchStream:
        n_shards = math.lcm(math.gcd(self.batch_size, N_SHARDS), self.world_size)
        per_rank = n_shards // self.world_size
        return BatchStream(
            [
                stream(self.seed, purpose, self.step, shard, device=self.device)
                for shard in range(self.rank * per_rank, (self.rank + 1) * per_rank)
            ],
            self.batch_size // n_shards,
        )
