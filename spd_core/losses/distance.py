"""How far masked outputs, and V U, are from the target's own, as (sum, count)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from spd_core.components import LinearComponents
from spd_core.fast.fused import fused
from spd_core.precision import at_least_float32

LossParts = tuple[Float[Tensor, ""], int]
"""A loss as (sum, count): parts of microbatches and ranks add up exactly."""


def distance(
    kind: Literal["mse", "kl"], pred: Float[Tensor, "... d_out"], target: Float[Tensor, "... d_out"]
) -> LossParts:
    """Squared error per output element, or KL(target || pred) per position in nats."""
    match kind:
        case "mse":
            return fused(_squared_error, pred.device)(pred, target), target.numel()
        case "kl":
            return fused(_kl, pred.device)(pred, target), target[..., 0].numel()


def _squared_error(pred: Tensor, target: Tensor) -> Float[Tensor, ""]:
    return (at_least_float32(pred) - at_least_float32(target)).square().sum()


def _kl(pred: Tensor, target: Tensor) -> Float[Tensor, ""]:
    log_pred, log_target = (
        at_least_float32(pred).log_softmax(-1),
        at_least_float32(target).log_softmax(-1),
    )
    return F.kl_div(log_pred, log_target, reduction="sum", log_target=True)


def faithfulness(components: dict[str, LinearComponents]) -> LossParts:
    """Sum over modules of |W - (V U)^T|^2, over the total weight count."""
    errors = [c.weight_error().square().sum() for c in components.values()]
    return torch.stack(errors).sum(), sum(c.weight.numel() for c in components.values())
