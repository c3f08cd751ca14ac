"""One part of a batch with all that the losses share, computed once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from spd_core.ci_fns import CausalImportance
from spd_core.randomness import StepRandomness


@dataclass(frozen=True)
class Batch:
    """The examples of one rank, or of one of its microbatches."""

    examples: Float[Tensor, "batch ..."]
    target_out: Float[Tensor, "batch ..."]
    inputs: dict[str, Float[Tensor, "batch ... d_in"]]
    ci: dict[str, CausalImportance]
    randomness: StepRandomness

    @property
    def positions(self) -> tuple[int, ...]:
        """The shape of one example's positions: () or (seq,)."""
        return tuple(next(iter(self.ci.values())).lower.shape[1:-1])

    @property
    def n_positions(self) -> int:
        return next(iter(self.ci.values())).lower[..., 0].numel()


Batches = Callable[[], Iterable[Batch]]
"""All parts of a rank's batch, the same ones at every call."""
