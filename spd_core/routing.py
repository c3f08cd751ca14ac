"""Which modules run on their components, at each position."""

from jaxtyping import Bool
from torch import Tensor

from spd_core.randomness import BatchStream

Route = Bool[Tensor, "..."] | None
"""True where the module runs on its components; None = everywhere."""


def route_all(names: list[str]) -> dict[str, Route]:
    return dict.fromkeys(names)


def route_uniform_k_subset(
    names: list[str], shape: tuple[int, ...], stream: BatchStream
) -> dict[str, Route]:
    """k ~ Uniform{1..n_modules}, then a uniformly random k-subset, independently per position.

    `shape` is that of one example's positions: () or (seq,).
    """
    n = len(names)
    k = stream.integers(1, n + 1, *shape)
    rank = stream.uniform(*shape, n).argsort(dim=-1).argsort(dim=-1)
    chosen = rank < k.unsqueeze(-1)
    return {name: chosen[..., i] for i, name in enumerate(names)}


def route_static_probability(
    names: list[str], p: float, shape: tuple[int, ...], stream: BatchStream
) -> dict[str, Route]:
    """Each module runs on its components with probability p, independently per position."""
    chosen = stream.uniform(*shape, len(names)) < p
    return {name: chosen[..., i] for i, name in enumerate(names)}
