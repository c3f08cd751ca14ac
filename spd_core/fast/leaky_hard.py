"""The leaky hard sigmoids: `lower` in [0, 1] for masks, `upper` for the minimality loss.

Both are at least float32, also of bfloat16.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from spd_core.fast import native
from spd_core.fast.fused import fused
from spd_core.precision import at_least_float32

LEAK = 0.01


def lower_leaky_hard(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """clamp(x, 0, 1); below 0 the gradient leaks, but only where descent would raise x."""
    if native.is_native(x):
        return native.lower_leaky_hard(x)
    return cast(Tensor, _LowerLeakyHard.apply(x))


def upper_leaky_hard(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """clamp(x, 0, 1) up to 1, then rising with slope 0.01."""
    x = at_least_float32(x)
    return torch.where(x > 1, 1 + LEAK * (x - 1), x.clamp(0, 1))


class _LowerLeakyHard(torch.autograd.Function):
    """Keeps only x, which others keep as well; compiled as a whole it would keep comparisons."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return fused(_clamped, x.device)(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,), (grad,) = ctx.saved_tensors, grad_outputs
        return fused(_leaked, x.device)(x, grad)


def _clamped(x: Tensor) -> Tensor:
    return at_least_float32(x).clamp(0, 1)


def _leaked(x: Tensor, grad: Tensor) -> Tensor:
    return torch.where(x <= 0, LEAK * grad.clamp(max=0), grad * (x <= 1)).to(x.dtype)
