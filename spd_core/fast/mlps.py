"""The small MLPs of subcomponents on a GPU, whose hidden activations are never written down."""

import math
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from spd_core.fast.fused import fused


def scalar_mlps(
    x: Float[Tensor, "batch C"],
    w1: Float[Tensor, "C hidden 1"],
    b1: Float[Tensor, "C hidden 1"],
    w2: Float[Tensor, "C 1 hidden"],
    b2: Float[Tensor, "C 1 1"],
) -> Float[Tensor, "batch C"]:
    """`native.scalar_mlps` for a GPU: hidden activations are computed again, not kept."""
    with torch.autocast(x.device.type, enabled=False):
        return cast(Tensor, _ScalarMLPs.apply(x, w1[..., 0], b1[..., 0], w2[:, 0], b2[:, 0, 0]))


class _ScalarMLPs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return fused(_mlps, inputs[0].device)(*inputs)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, ...]:
        (grad,), device = grad_outputs, grad_outputs[0].device
        grad_x = fused(_mlps_grad_x, device)(grad, *ctx.saved_tensors)
        return grad_x, *fused(_mlps_grad_parameters, device)(grad, *ctx.saved_tensors)


def _mlps(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return (F.gelu(x[..., None].to(w1.dtype) * w1 + b1) * w2).sum(-1) + b2


def _mlps_grad_x(g: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, _b2: Tensor) -> Tensor:
    z = x[..., None].to(w1.dtype) * w1 + b1
    return (g * (w1 * w2 * _gelu_slope(z)).sum(-1)).to(x.dtype)


def _mlps_grad_parameters(
    g: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, _b2: Tensor
) -> tuple[Tensor, ...]:
    g, x = g[..., None], x[..., None].to(w1.dtype)
    z = x * w1 + b1
    grad_z = g * _gelu_slope(z)
    grad_w1, grad_b1 = (grad_z * x).sum(0) * w2, grad_z.sum(0) * w2
    return grad_w1, grad_b1, (g * F.gelu(z)).sum(0), g[..., 0].sum(0)


def _gelu_slope(z: Tensor) -> Tensor:
    """The normal distribution's cdf, and z times its density."""
    return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z * z) / (2 * math.pi) ** 0.5
