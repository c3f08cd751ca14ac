"""Subcomponents of one weight matrix: rank-one matrices V[:, c] U[c, :]."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from spd_core.fast.masked import LazyMask, masked_product


class Identity(nn.Module):
    """An identity matrix of d features, inserted before a module so that it can be decomposed."""

    def __init__(self, d: int) -> None:
        super().__init__()
        # Not persistent: the target's own checkpoint knows nothing of it.
        self.register_buffer("weight", torch.eye(d), persistent=False)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return x


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D, a linear map that stores its weight as (d_in, d_out)."""
    # By name: importing transformers takes seconds, and few targets need it.
    return type(module).__module__ == "transformers.pytorch_utils" and hasattr(module, "nf")


def is_decomposable(module: nn.Module) -> bool:
    """Whether a pattern may match it: identities, which are inserted, have names of their own."""
    return isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module)


def check_decomposable(where: str, path: str, module: nn.Module) -> None:
    """Refuse a module whose output need not be W x + b or W[token]; `where` is the config field."""
    known = (nn.Linear.forward, nn.Embedding.forward)
    if type(module).forward not in known and not is_conv1d(module):
        raise ValueError(
            f"{where}: {path!r} is a {type(module).__name__}, whose forward() is its own and may "
            "compute something else than W x + b; leave it out"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError(
            f"{where}: {path!r} is an embedding with max_norm={module.max_norm}, which rescales "
            "its weight as it is used; set max_norm=None in the target"
        )


class LinearComponents(nn.Module):
    """C subcomponents of a linear map W (d_out, d_in), with W ~ (V U)^T.

    V starts as N(0, 1/d_in) and U as N(0, 1/C) (fan-in, linear gain).
    """

    def __init__(self, module: nn.Module, C: int, generator: torch.Generator) -> None:
        super().__init__()
        # In a tuple, so that the target's module is not registered a second time.
        self._module: tuple[Any] = (module,)
        d_out, d_in = self.weight.shape
        self.C, self.takes_tokens = C, isinstance(module, nn.Embedding)
        self.V = nn.Parameter(torch.randn(d_in, C, generator=generator) / d_in**0.5)
        self.U = nn.Parameter(torch.randn(C, d_out, generator=generator) / C**0.5)

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The target's weight; an embedding maps a one-hot token, so it is d_embed x n_tokens."""
        (module,) = self._module
        weight = module.weight.detach()
        return weight if isinstance(module, nn.Linear | Identity) else weight.T

    def inner_acts(
        self, x: Float[Tensor, "... d_in"] | Int[Tensor, "..."]
    ) -> Float[Tensor, "... C"]:
        """x V; tokens are looked up in V (n_tokens, C), never multiplied."""
        if self.takes_tokens:
            return F.embedding(x, self.V)
        if x.dtype.itemsize > 2 or not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.V.dtype)
        return x @ self.V

    def weight_error(self) -> Float[Tensor, "d_out d_in"]:
        """W - (V U)^T, what the subcomponents leave out, in full precision."""
        with torch.autocast(self.V.device.type, enabled=False):
            return self.weight - (self.V @ self.U).T

    def forward(
        self,
        inner_acts: Float[Tensor, "... C"],
        target_out: Float[Tensor, "... d_out"],
        mask: Float[Tensor, "... C"] | LazyMask | None,
        delta_mask: Float[Tensor, "..."] | None,
    ) -> Float[Tensor, "... d_out"]:
        """Masked output ((x V) * m) U + m_d x (W - (V U)^T)^T + b, of `inner_acts` x V.

        No mask means all ones. With y the module's own output on x, the delta term is
        m_d (y - b) - m_d (x V) U, so no dense delta matrix is built.
        """
        bias = getattr(self._module[0], "bias", None)
        if bias is not None:
            # A bias of half precision would round what is added to it and subtracted again.
            bias = bias.detach().to(torch.promote_types(bias.dtype, self.V.dtype))
        out, m_d = masked_product(inner_acts, self.U, mask, delta_mask)
        if m_d is not None:
            y = target_out if bias is None else target_out - bias
            # Not wider than these two: under autocast all of them would go through float32.
            out = torch.addcmul(out, m_d.to(torch.promote_types(out.dtype, y.dtype)), y)
        return (out if bias is None else out + bias).to(target_out.dtype)


def tie(first: LinearComponents, second: LinearComponents) -> None:
    """Start `second` as the transpose of `first`: V2 = U1^T, U2 = V1^T."""
    shapes = [tuple(part.shape) for part in (first.V, first.U, second.U.T, second.V.T)]
    if shapes[:2] != shapes[2:]:
        raise ValueError(
            f"decompose.tied: cannot tie V and U of {shapes[:2]} to U^T and V^T of {shapes[2:]}"
        )
    with torch.no_grad():
        second.V.copy_(first.U.T)
        second.U.copy_(first.V.T)
