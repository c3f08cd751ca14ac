"""Subcomponent activations under masks, (x V) (m - m_d), read and written once."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from spd_core.fast import native
from spd_core.fast.fused import fused
from spd_core.fast.hashed import GAMMA, Draw, hashed
from spd_core.rows import Rows

PART = 64  # rows whose gradients of a shared source are summed by one thread


@dataclass(frozen=True)
class LazyMask:
    """The mask ci + (1 - ci) r, and that of the delta, which are never written down.

    The source r is drawn anew at every position, or is the same at all. With `Rows` the mask is for
    these alone, though ci and a draw are for all positions.
    """

    ci: Float[Tensor, "batch ... C"]
    source: Draw | Float[Tensor, "1 ... C_or_C_plus_1"]
    with_delta: bool
    rows: Rows | Bool[Tensor, "..."] | None


def masked(
    inner_acts: Float[Tensor, "... C"],
    mask: Float[Tensor, "... C"] | LazyMask | None,
    delta_mask: Float[Tensor, "..."] | None,
) -> tuple[Float[Tensor, "... C"], Float[Tensor, "... 1"] | None]:
    """(x V) (m - m_d) in the precision of x V, and m_d, the delta's mask.

    No mask means ones; no delta mask, zero, but a lazy mask brings its own.
    """
    device = inner_acts.device
    if isinstance(mask, LazyMask):
        ci, source, with_delta = mask.ci, mask.source, mask.with_delta
        if native.is_native(ci):
            return _masked_in_a_loop(inner_acts, mask)
        assert not isinstance(source, Tensor) and source.rows is None
        return fused(_masked_by_draw, device)(inner_acts, ci, with_delta, source)
    if delta_mask is None:
        return (inner_acts if mask is None else inner_acts * mask), None
    m_d = delta_mask.unsqueeze(-1)
    return fused(_masked, device)(inner_acts, mask, m_d), m_d


def _masked_in_a_loop(inner_acts: Tensor, mask: LazyMask) -> tuple[Tensor, Tensor | None]:
    if not isinstance(mask.rows, Rows):  # position embeddings run once for all examples
        inner_acts = inner_acts.expand_as(mask.ci)
    shared = mask.source.flatten() if isinstance(mask.source, Tensor) else None
    pair = _MaskedInALoop.apply(inner_acts, mask.ci, shared, mask)
    out, m_d = cast(tuple[Tensor, Tensor], pair)
    if not mask.with_delta:
        return out, None
    return out, m_d if shared is None else shared[-1:]


def _masked(inner_acts: Tensor, mask: Tensor | None, m_d: Tensor) -> Tensor:
    return (inner_acts * ((1 if mask is None else mask) - m_d)).to(inner_acts.dtype)


def _masked_by_draw(
    inner_acts: Tensor, ci: Tensor, with_delta: bool, draw: Draw
) -> tuple[Tensor, Tensor | None]:
    *positions, C = ci.shape
    width = C + 1 if with_delta else C
    per_row = math.prod(positions[1:]) * width
    r = hashed(draw.key, draw.step, draw.first * per_row, draw.n * per_row, ci.dtype)
    r = r.view(*positions, width)
    mask, m_d = torch.addcmul(r[..., :C], ci, 1 - r[..., :C]), r[..., C:] if with_delta else None
    difference = mask if m_d is None else mask - m_d
    return (inner_acts * difference).to(inner_acts.dtype), m_d


class _MaskedInALoop(torch.autograd.Function):
    """`masked` of a lazy mask, which draws its numbers again for the gradients."""

    @staticmethod
    def forward(
        ctx: Any, inner_acts: Tensor, ci: Tensor, shared: Tensor | None, mask: LazyMask
    ) -> tuple[Tensor, Tensor]:
        acts, ci, (*positions, C) = inner_acts.contiguous(), ci.contiguous(), ci.shape
        index, n_own = torch.arange(math.prod(positions)), math.prod(positions)
        if isinstance(mask.rows, Rows):
            index, n_own = mask.rows.index, mask.rows.n
        assert acts.shape[:-1].numel() == len(index) and ci.dtype == torch.float32
        assert acts.dtype in (torch.float32, torch.bfloat16)
        width, half = C + mask.with_delta, acts.dtype == torch.bfloat16
        if shared is not None:
            key, shift, places, source = 0, 0, index, shared.contiguous()
        else:
            assert isinstance(mask.source, Draw)
            key, step, first, n, of_batch = mask.source
            n_each = math.prod(positions[1:])
            examples = first + (torch.arange(n) if of_batch is None else of_batch)
            places = (examples[:, None] * n_each + torch.arange(n_each)).flatten()[index]
            key, shift, source = int(key), int(step) * GAMMA, ci.new_empty(0)
        assert source.dtype == torch.float32
        ctx.sizes = len(index), n_own, C, width, key, shift, half, shared is not None
        read = index, places, acts, ci, source
        ctx.save_for_backward(*read)
        out, m_d = torch.empty_like(acts), ci.new_empty(*acts.shape[:-1], 1)
        native.run("masked_forward", ctx.sizes, *read, out, m_d)
        ctx.mark_non_differentiable(m_d)
        return out, m_d

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        *_, acts, ci, source = ctx.saved_tensors
        n, n_own, *sizes = ctx.sizes
        grad_acts, grad_ci = torch.empty_like(acts), None
        if ctx.needs_input_grad[1]:
            grad_ci = torch.zeros_like(ci)
        parts = ci.new_zeros(-(-n // PART), len(source))
        sizes = n, 0 if grad_ci is None else n_own, PART, *sizes
        written = grad_acts, ci if grad_ci is None else grad_ci, parts
        native.run(
            "masked_backward", sizes, *ctx.saved_tensors, grad_outputs[0].contiguous(), *written
        )
        return grad_acts, grad_ci, parts.sum(0) if len(source) else None, None
