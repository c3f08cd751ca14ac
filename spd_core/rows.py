"""Some of the positions of a batch, by their places."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ROUND = 32


@dataclass(frozen=True)
class Rows:
    """Positions, counted through all dimensions; the first n of `index`, what follows fills it up.

    In half precision a CPU makes a kernel for every new number of rows, and keeps it: a few
    numbers should come again and again.
    """

    index: Int[Tensor, "n_filled_up"]
    n: int

    @staticmethod
    def of(chosen: Bool[Tensor, "..."]) -> "Rows":
        """Where `chosen` is true."""
        rows = chosen.flatten().nonzero()[:, 0]
        return Rows(torch.cat([rows, rows[:1].expand(-len(rows) % ROUND)]), len(rows))


def at_rows(
    x: Float[Tensor, "..."], rows: Rows | Bool[Tensor, "..."] | None, n_dims: int
) -> Float[Tensor, "..."]:
    """x at some of its positions, which are its first n_dims dimensions; (n_filled_up, ...)."""
    return x.flatten(0, n_dims - 1).index_select(0, rows.index) if isinstance(rows, Rows) else x
