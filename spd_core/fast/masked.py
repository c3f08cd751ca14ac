"""Masked products ((x V) (m - m_d)) U, whose masks and masked activations are not kept."""

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


def masked_product(
    inner_acts: Float[Tensor, "... C"],
    U: Float[Tensor, "C d_out"],
    mask: Float[Tensor, "... C"] | LazyMask | None,
    delta_mask: Float[Tensor, "..."] | None,
) -> tuple[Float[Tensor, "... d_out"], Float[Tensor, "... 1"] | None]:
    """((x V) (m - m_d)) U, and m_d, the delta's mask.

    No mask means ones; no delta mask, zero, but a lazy mask brings its own.
    """
    if isinstance(mask, LazyMask):
        return _lazily_masked_product(inner_acts, U, mask)
    if delta_mask is None:
        return (inner_acts if mask is None else inner_acts * mask) @ U, None
    m_d = delta_mask.unsqueeze(-1)
    return fused(_masked, inner_acts.device)(inner_acts, mask, m_d) @ U, m_d


def _masked(inner_acts: Tensor, mask: Tensor | None, m_d: Tensor) -> Tensor:
    return (inner_acts * ((1 if mask is None else mask) - m_d)).to(inner_acts.dtype)


def _lazily_masked_product(
    inner_acts: Tensor, U: Tensor, mask: LazyMask
) -> tuple[Tensor, Tensor | None]:
    if not isinstance(mask.rows, Rows):  # position embeddings run once for all examples
        inner_acts = inner_acts.expand_as(mask.ci)
    kind, dtype = inner_acts.device.type, U.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    shared = mask.source if isinstance(mask.source, Tensor) else None
    product = _ProductByLoops if native.is_native(mask.ci) else _MaskedProduct
    pair = product.apply(inner_acts, mask.ci, U, shared, mask, dtype)
    out, m_d = cast(tuple[Tensor, Tensor], pair)
    if not mask.with_delta:
        return out, None
    return out, m_d if shared is None else shared.flatten()[-1:]


class _MaskedProduct(torch.autograd.Function):
    """Masked activations are made again for the gradients, and their numbers drawn, not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        acts: Tensor,
        ci: Tensor,
        U: Tensor,
        shared: Tensor | None,
        mask: LazyMask,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        if native.is_native(ci):
            masked, m_d, *ctx.of = _looped(acts, ci, shared, mask)
        else:
            assert not isinstance(mask.rows, Rows)
            assert isinstance(mask.source, Tensor) or mask.source.rows is None
            ctx.of = mask.with_delta, mask.source if shared is None else None
            masked, m_d = fused(_by_source, acts.device)(acts, ci, mask.with_delta, mask.source)
            if shared is not None:  # of which m_d is a part, and no output may be
                m_d = ci.new_empty(0)
        ctx.save_for_backward(acts, ci, U, shared)
        ctx.mark_non_differentiable(m_d)
        return masked.to(dtype) @ U.to(dtype), m_d

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        acts, ci, U, shared = ctx.saved_tensors
        grad, wanted = grad_outputs[0], ctx.needs_input_grad
        grad_masked = (grad @ U.T.to(grad.dtype)).to(acts.dtype)
        if native.is_native(ci):
            found = _looped_backward(grad_masked, acts, ci, shared, wanted, *ctx.of)
        else:
            with_delta, draw = ctx.of
            source = draw if shared is None else shared
            gradients = fused(_gradients_by_source, acts.device)
            found = gradients(grad_masked, acts, ci, with_delta, source, wanted[:4])
        masked, grad_acts, grad_ci, grad_shared = found
        grad_U = None
        if masked is not None:
            grad_U = masked.flatten(0, -2).to(grad.dtype).T @ grad.flatten(0, -2)
            grad_U = grad_U.to(U.dtype)
        return grad_acts, grad_ci, grad_U, grad_shared, None, None


class _ProductByLoops(_MaskedProduct):
    """Loops give no gradients of gradients, so these are refused."""

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        return _MaskedProduct.backward(ctx, *grad_outputs)


def _by_source(
    acts: Tensor, ci: Tensor, with_delta: bool, source: Tensor | Draw
) -> tuple[Tensor, Tensor]:
    r, m_d = _numbers(ci, with_delta, source)
    # A copy, for as a part of all numbers it would keep them.
    return (acts * (torch.addcmul(r, ci, 1 - r) - m_d)).to(acts.dtype), m_d.contiguous()


def _gradients_by_source(
    grad: Tensor,
    acts: Tensor,
    ci: Tensor,
    with_delta: bool,
    source: Tensor | Draw,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Masked activations, and the gradients of acts, ci and a shared source."""
    for_acts, for_ci, for_U, for_source = wanted
    r, m_d = _numbers(ci, with_delta, source)
    difference = torch.addcmul(r, ci, 1 - r) - m_d
    of_mask, grad_source = grad.to(ci.dtype) * acts.to(ci.dtype), None
    if for_source:
        assert isinstance(source, Tensor)
        each = [of_mask * (1 - ci)]
        if with_delta:
            each.append(-of_mask.sum(-1, keepdim=True))
        grad_source = torch.cat([e.flatten(0, -2).sum(0) for e in each]).view(source.shape)
    return (
        (acts * difference).to(acts.dtype) if for_U else None,
        (grad * difference).to(acts.dtype) if for_acts else None,
        of_mask * (1 - r) if for_ci else None,
        grad_source,
    )


def _numbers(ci: Tensor, with_delta: bool, source: Tensor | Draw) -> tuple[Tensor, Tensor]:
    """The sources of the subcomponents, and the delta's mask, 0 where there is none."""
    *positions, C = ci.shape
    if isinstance(source, Draw):
        width = C + 1 if with_delta else C
        per_row = math.prod(positions[1:]) * width
        start, n = source.first * per_row, source.n * per_row
        source = hashed(source.key, source.step, start, n, ci.dtype).view(*positions, width)
    return source[..., :C], source[..., C:] if with_delta else ci.new_zeros(1)


def _looped(
    acts: Tensor, ci: Tensor, shared: Tensor | None, mask: LazyMask
) -> tuple[Tensor, Tensor, tuple[int, ...], int, tuple[Tensor, ...]]:
    """`_by_source` at the mask's rows; also sizes and arrays for `_looped_backward`."""
    *positions, C = ci.shape
    index, n_own = torch.arange(math.prod(positions)), math.prod(positions)
    if isinstance(mask.rows, Rows):
        index, n_own = mask.rows.index, mask.rows.n
    assert acts.shape[:-1].numel() == len(index) and ci.dtype == torch.float32
    width, half, key, shift, places = C + mask.with_delta, native.HALF[acts.dtype], 0, 0, index
    if shared is None:
        assert isinstance(mask.source, Draw)
        key, step, first, n, of_batch = mask.source
        n_each = math.prod(positions[1:])
        examples = first + (torch.arange(n) if of_batch is None else of_batch)
        places = (examples[:, None] * n_each + torch.arange(n_each)).flatten()[index]
        key, shift = int(key), int(step) * GAMMA
    sizes = C, width, key, shift, half, shared is not None
    acts, ci = acts.contiguous(), ci.contiguous()
    masked, m_d = torch.empty_like(acts), ci.new_empty(*acts.shape[:-1], 1)
    read = index, places, acts, ci, _flat(shared, ci)
    native.run("masked_forward", (len(index), n_own, *sizes), *read, masked, m_d)
    return masked, m_d, sizes, n_own, (index, places)


def _looped_backward(
    grad: Tensor,
    acts: Tensor,
    ci: Tensor,
    shared: Tensor | None,
    wanted: tuple[bool, ...],
    sizes: tuple[int, ...],
    n_own: int,
    places: tuple[Tensor, Tensor],
) -> tuple[Tensor | None, ...]:
    _, for_ci, for_U, *_ = wanted
    acts, ci, n, source = acts.contiguous(), ci.contiguous(), len(places[0]), _flat(shared, ci)
    nothing, grad_acts = ci.new_empty(0), torch.empty_like(acts)
    grad_ci = torch.zeros_like(ci) if for_ci else nothing
    masked = torch.empty_like(acts) if for_U else nothing
    parts = ci.new_zeros(-(-n // PART), len(source))
    sizes = n, n_own if for_ci else 0, PART, for_U, *sizes
    read = *places, acts, ci, source, grad.contiguous()
    native.run("masked_backward", sizes, *read, grad_acts, grad_ci, parts, masked)
    grad_shared = None if shared is None else parts.sum(0).view_as(shared)
    return masked if for_U else None, grad_acts, grad_ci if for_ci else None, grad_shared


def _flat(shared: Tensor | None, like: Tensor) -> Float[Tensor, "width_or_0"]:
    return like.new_empty(0) if shared is None else shared.flatten().contiguous()
