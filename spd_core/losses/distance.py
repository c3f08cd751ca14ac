"""How far a masked output is from the target's, as (sum, count)."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

LossParts = tuple[Float[Tensor, ""], int]
"""A loss as (sum, count): parts of microbatches and ranks add up exactly."""


def distance(
    kind: Literal["mse", "kl"],
    pred: Float[Tensor, "... d_out"],
    target: Float[Tensor, "... d_out"],
) -> LossParts:
    """Squared error per output element, or KL(target || pred) per position in nats."""
    match kind:
        case "mse":
            return (pred - target).square().sum(), target.numel()
        case "kl":
            kl = F.kl_div(
                pred.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True
            )
            return kl, target[..., 0].numel()
