"""Subcomponents of one weight matrix: rank-one matrices V[:, c] U[c, :]."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LinearComponents(nn.Module):
    """C subcomponents of a linear map W (d_out, d_in), with W ~ (V U)^T.

    V starts as N(0, 1/d_in) and U as N(0, 1/C) (fan-in, linear gain).
    """

    weight: Float[Tensor, "d_out d_in"]
    bias: Float[Tensor, "d_out"] | None

    def __init__(self, linear: nn.Linear, C: int, generator: torch.Generator) -> None:
        super().__init__()
        d_out, d_in = linear.weight.shape
        self.C = C
        self.V = nn.Parameter(torch.randn(d_in, C, generator=generator) / d_in**0.5)
        self.U = nn.Parameter(torch.randn(C, d_out, generator=generator) / C**0.5)
        # The target's own data: buffers, so that they move with the module and never train.
        self.register_buffer("weight", linear.weight.detach().clone(), persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        self.register_buffer("bias", bias, persistent=False)

    def inner_acts(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... C"]:
        return x @ self.V

    def weight_error(self) -> Float[Tensor, "d_out d_in"]:
        """W - (V U)^T, what the subcomponents leave out."""
        return self.weight - (self.V @ self.U).T

    def forward(
        self,
        x: Float[Tensor, "... d_in"],
        target_out: Float[Tensor, "... d_out"],
        mask: Float[Tensor, "... C"] | None,
        delta_mask: Float[Tensor, "..."] | None,
    ) -> Float[Tensor, "... d_out"]:
        """Masked output ((x V) * m) U + m_d x (W - (V U)^T)^T + b; no mask means all ones.

        With y the module's own output on x, the delta term is m_d (y - b) - m_d (x V) U, so no
        dense delta matrix is built.
        """
        inner = self.inner_acts(x)
        if delta_mask is None:
            out = (inner if mask is None else inner * mask) @ self.U
            return out if self.bias is None else out + self.bias
        m_d = delta_mask.unsqueeze(-1)
        difference = (1 if mask is None else mask) - m_d
        if self.bias is None:
            return torch.addcmul((inner * difference) @ self.U, m_d, target_out)
        return torch.addcmul((inner * difference) @ self.U, m_d, target_out - self.bias) + self.bias


def tie(first: LinearComponents, second: LinearComponents) -> None:
    """Start `second` as the transpose of `first`: V2 = U1^T, U2 = V1^T.

    Raises:
        ValueError: the shapes are not each other's transpose.
    """
    if first.V.shape != second.U.T.shape or first.U.shape != second.V.T.shape:
        raise ValueError(
            f"cannot tie components of shapes V {tuple(first.V.shape)}, U {tuple(first.U.shape)} "
            f"and V {tuple(second.V.shape)}, U {tuple(second.U.shape)}: "
            "decompose.tied needs two transposed modules with the same C"
        )
    with torch.no_grad():
        second.V.copy_(first.U.T)
        second.U.copy_(first.V.T)
