"""A finished decomposition on fresh batches of its data: what clustering and harvest look at."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spd_core.data.batches import Decomposition, draw_examples
from spd_core.distributed import Dist
from spd_core.load import load_run
from spd_core.randomness import StepRandomness
from spd_core.run_dir import RunDir


def load_decomposition(
    run_dir: RunDir, device: Literal["auto", "cpu", "cuda"]
) -> tuple[Decomposition, int]:
    """The newest checkpoint of a run, and its step; `auto` is a GPU where there is one.

    Raises:
        ValueError: there is no checkpoint, or the run does not load.
    """
    try:
        run = load_run(run_dir.path)
    except OSError as error:  # no checkpoint, or no target in the store
        raise ValueError(f"{run_dir.path} cannot be loaded: {error}") from None
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    place = torch.device("cuda" if on_gpu else "cpu")
    model = run.model.to(place)
    return Decomposition(run.config, model, Dist(0, 1, place), run_dir.data), run.step


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

    A module that runs at fewer positions than others, as a pooler does, counts at each of theirs.
    Binomial sampling adds no noise here.
    """
    randomness = StepRandomness(seed, step, 0, 1, batch_size, d.dist.device, phase=purpose)
    with d.autocast():
        examples = draw_examples(d.config, d.data, randomness, purpose)
        target_out, inputs = d.model.run_target(examples)
        ci, _ = d.model.causal_importances(inputs, noise=None, checkpointing="off")
    lower = {name: importance.lower.float() for name, importance in ci.items()}
    positions = torch.broadcast_shapes(*(values.shape[:-1] for values in lower.values()))
    flat = {n: v.expand(*positions, v.shape[-1]).flatten(0, -2) for n, v in lower.items()}
    return Observed(examples, target_out, positions, flat)
