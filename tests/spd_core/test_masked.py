"""Masked activations against the formula, and drawn masks against those that are written down."""

import pytest
import torch

from spd_core.fast.counted import CountedStream
from spd_core.fast.masked import DrawnMask, masked


def draw():
    return CountedStream((0, "test"), torch.tensor(3), 2, 4).next()


def numbers(width):
    """Those that `draw` stands for."""
    return CountedStream((0, "test"), torch.tensor(3), 2, 4).uniform(5, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_and_delta_masks(dtype):
    acts, mask, m_d = torch.randn(4, 5, 3).to(dtype), torch.rand(4, 5, 3), torch.rand(4, 5)
    got, column = masked(acts, mask, m_d)
    wanted = acts.double() * (mask.double() - m_d.double()[..., None])
    assert got.dtype == dtype and torch.equal(column, m_d[..., None])
    torch.testing.assert_close(got.double(), wanted, rtol=2e-2 if dtype != torch.float32 else 1e-5,
                               atol=1e-2 if dtype != torch.float32 else 1e-6)  # fmt: skip
    ones, _ = masked(acts, None, m_d)
    assert torch.equal(ones, masked(acts, torch.ones(4, 5, 3), m_d)[0])


def test_without_a_delta():
    acts, mask = torch.randn(4, 5, 3), torch.rand(4, 5, 3)
    assert torch.equal(masked(acts, mask, None)[0], acts * mask)
    assert torch.equal(masked(acts, None, None)[0], acts)
    assert masked(acts, mask, None)[1] is None


@pytest.mark.parametrize("with_delta", [True, False])
def test_a_drawn_mask_is_the_one_that_its_numbers_give(with_delta):
    acts, ci = (torch.randn(4, 5, 3).requires_grad_() for _ in range(2))
    r = numbers(4 if with_delta else 3)
    explicit = ci + (1 - ci) * r[..., :3]
    wanted, wanted_m_d = masked(acts, explicit, r[..., 3] if with_delta else None)
    got, m_d = masked(acts, DrawnMask(ci, draw(), with_delta), None)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert (m_d is None) == (wanted_m_d is None)
    if with_delta:
        assert torch.equal(m_d, wanted_m_d)
    up = torch.randn(4, 5, 3)
    for a, b in zip(
        torch.autograd.grad(got, (acts, ci), up),
        torch.autograd.grad(wanted, (acts, ci), up),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
