"""Subcomponent activations under masks, (x V) (m - m_d), in one kernel on a GPU."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spd_core.fast.counted import Draw, hashed
from spd_core.fast.fused import fused


@dataclass(frozen=True)
class DrawnMask:
    """The mask ci + (1 - ci) r, and that of the delta, of numbers r that are never written down."""

    ci: Float[Tensor, "batch ... C"]
    draw: Draw
    with_delta: bool


def masked(
    inner_acts: Float[Tensor, "... C"],
    mask: Float[Tensor, "... C"] | DrawnMask | None,
    delta_mask: Float[Tensor, "..."] | None,
) -> tuple[Float[Tensor, "... C"], Float[Tensor, "... 1"] | None]:
    """(x V) (m - m_d) in the precision of x V, and m_d, the delta's mask.

    No mask means ones; no delta mask, zero, but a drawn mask brings its own.
    """
    device, m_d = inner_acts.device, None if delta_mask is None else delta_mask.unsqueeze(-1)
    if isinstance(mask, DrawnMask):
        return fused(_masked_by_draw, device)(inner_acts, mask.ci, mask.with_delta, mask.draw)
    if m_d is None:
        return (inner_acts if mask is None else inner_acts * mask), None
    return fused(_masked, device)(inner_acts, mask, m_d), m_d


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
