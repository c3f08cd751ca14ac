"""A finished decomposition on fresh batches of its data: what clustering and harvest look at."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spd_core.data.batches import Decomposition, draw_examples
from spd_core.randomness import StepRandomness


@dataclass(frozen=True)
class Observed:
    """One batch; `positions` is (batch,) or (batch, seq), and causal importances are flattened."""

    examples: Float[Tensor, "batch ..."]
    target_out: Float[Tensor, "batch ..."]
    positions: torch.Size
    ci: dict[str, Float[Tensor, "samples C"]]


@torch.no_grad()
def observe(d: Decomposition, seed: int, step: int, batch_size: int, purpose: str) -> Observed:
    """Batch `step` of those that (seed, purpose) name; text comes from the training split.

    A module that runs at fewer positions than others, as one of position embeddings does, counts
    at each of theirs. Binomial sampling adds no noise here.
    """
    randomness = StepRandomness(seed, step, 0, 1, batch_size, d.dist.device, phase=purpose)
    with d.autocast():
        examples = draw_examples(d.config, d.data, randomness, purpose)
        target_out, inputs = d.model.run_target(examples)
        ci = d.model.causal_importances(inputs, d.model.own_acts(inputs), noise=None)
    lower = {name: importance.lower.float() for name, importance in ci.items()}
    positions = torch.broadcast_shapes(*(values.shape[:-1] for values in lower.values()))
    flat = {n: v.expand(*positions, v.shape[-1]).flatten(0, -2) for n, v in lower.items()}
    return Observed(examples, target_out, positions, flat)
