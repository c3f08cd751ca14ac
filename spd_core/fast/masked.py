"""Subcomponent activations under masks, (x V) (m - m_d), read and written once."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_core.fast import native
from spd_core.fast.fused import fused
from spd_core.fast.hashed import GAMMA, Draw, hashed
from spd_core.rows import Rows


@dataclass(frozen=True)
class DrawnMask:
    """The mask ci + (1 - ci) r, and that of the delta, of numbers r that are never written down.

    With `rows` it is for these alone, though ci and the numbers are for all positions.
    """

    ci: Float[Tensor, "batch ... C"]
    draw: Draw
    with_delta: bool
    rows: Rows | Bool[Tensor, "..."] | None


def masked(
    inner_acts: Float[Tensor, "... C"],
    mask: Float[Tensor, "... C"] | DrawnMask | None,
    delta_mask: Float[Tensor, "..."] | None,
) -> tuple[Float[Tensor, "... C"], Float[Tensor, "... 1"] | None]:
    """(x V) (m - m_d) in the precision of x V, and m_d, the delta's mask.

    No mask means ones; no delta mask, zero, but a drawn mask brings its own.
    """
    device = inner_acts.device
    if isinstance(mask, DrawnMask):
        if native.is_native(mask.ci):
            if not isinstance(mask.rows, Rows):  # position embeddings run once for all examples
                inner_acts = inner_acts.expand_as(mask.ci)
            pair = cast(tuple[Tensor, Tensor], _MaskedByDraw.apply(inner_acts, mask.ci, mask))
            return pair[0], pair[1] if mask.with_delta else None
        return fused(_masked_by_draw, device)(inner_acts, mask.ci, mask.with_delta, mask.draw)
    if delta_mask is None:
        return (inner_acts if mask is None else inner_acts * mask), None
    m_d = delta_mask.unsqueeze(-1)
    return fused(_masked, device)(inner_acts, mask, m_d), m_d


def add_delta(
    out: Float[Tensor, "... d_out"],
    m_d: Float[Tensor, "... 1"],
    target_out: Float[Tensor, "... d_out"],
    bias: Float[Tensor, "d_out"] | None,
) -> Float[Tensor, "... d_out"]:
    """out + m_d (target_out - b) + b in the precision of target_out; b is frozen."""
    return cast(Tensor, _AddDelta.apply(out, m_d, target_out, bias))


class _AddDelta(torch.autograd.Function):
    """Gradients without the full-precision copies that autograd makes of half-precision ones."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, m_d: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        y_only = y if bias is None else y - bias
        ctx.save_for_backward(m_d, y_only)
        ctx.dtypes = out.dtype, y.dtype
        total = torch.addcmul(out, m_d, y_only)
        return (total if bias is None else total + bias).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (m_d, y_only), (of_out, of_y) = grad_outputs, ctx.saved_tensors, ctx.dtypes
        grad_m_d = grad_y = None
        if ctx.needs_input_grad[1]:
            products = grad.to(m_d.dtype) * y_only
            grad_m_d = products.sum(-1, keepdim=True).sum_to_size(m_d.shape)
        if ctx.needs_input_grad[2]:
            grad_y = (grad * m_d).to(of_y)
        return grad.to(of_out), grad_m_d, grad_y, None


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


class _MaskedByDraw(torch.autograd.Function):
    """`_masked_by_draw` in one loop, which draws its numbers again for the gradients."""

    @staticmethod
    def forward(ctx: Any, inner_acts: Tensor, ci: Tensor, mask: DrawnMask) -> tuple[Tensor, Tensor]:
        (key, step, first, n, of_batch), (*positions, C) = mask.draw, ci.shape
        n_each, acts, ci = math.prod(positions[1:]), inner_acts.contiguous(), ci.contiguous()
        examples = first + (torch.arange(n) if of_batch is None else of_batch)
        places = (examples[:, None] * n_each + torch.arange(n_each)).flatten()
        index, n_own = torch.arange(len(places)), len(places)
        if isinstance(mask.rows, Rows):
            index, n_own = mask.rows.index, mask.rows.n
        assert acts.shape[:-1].numel() == len(index)
        width, shift = C + mask.with_delta, int(step) * GAMMA
        ctx.sizes = len(index), n_own, C, width, int(key), shift, acts.dtype == torch.bfloat16
        read = index, places[index], acts, ci
        ctx.save_for_backward(*read)
        out, m_d = torch.empty_like(acts), ci.new_empty(*acts.shape[:-1], 1)
        native.run("masked_forward", ctx.sizes, *read, out, m_d)
        ctx.mark_non_differentiable(m_d)
        return out, m_d

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (*_, acts, ci), grad = ctx.saved_tensors, grad_outputs[0].contiguous()
        gradients = torch.empty_like(acts), torch.zeros_like(ci)
        native.run("masked_backward", ctx.sizes, *ctx.saved_tensors, grad, *gradients)
        return *gradients, None
