"""The MLPs of subcomponents on a GPU (here the same operators on a CPU) in double precision."""

import numpy as np
import pytest
import torch
from scipy.special import erf

from spd_core.fast.mlps import scalar_mlps


@pytest.mark.parametrize("n, C, hidden", [(64, 7, 16), (1, 1, 1), (33, 5, 2)])
def test_values_and_gradients(n, C, hidden):
    shapes = [(n, C), (C, hidden, 1), (C, hidden, 1), (C, 1, hidden), (C, 1, 1)]
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    x, w1, b1, w2, b2 = (t.detach().double().numpy() for t in inputs)
    w1, b1, w2, b2 = w1[..., 0], b1[..., 0], w2[:, 0], b2[:, 0, 0]
    z = x[..., None] * w1 + b1
    cdf, density = (1 + erf(z / np.sqrt(2))) / 2, np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    out = scalar_mlps(*inputs)
    np.testing.assert_allclose(out.detach(), (w2 * z * cdf).sum(-1) + b2, rtol=1e-4, atol=1e-5)
    g = torch.randn(n, C)
    up = g.double().numpy()[..., None]
    grad_z = up * w2 * (cdf + z * density)
    wanted = [(grad_z * w1).sum(-1), (grad_z * x[..., None]).sum(0), grad_z.sum(0),
              (up * z * cdf).sum(0), up.sum((0, 2))]  # fmt: skip
    got = torch.autograd.grad(out, inputs, g)
    for gradient, formula, given in zip(got, wanted, inputs, strict=True):
        assert gradient.shape == given.shape
        np.testing.assert_allclose(gradient.flatten(), formula.ravel(), rtol=1e-3, atol=1e-4)


def test_half_precision_goes_in_and_its_gradient_comes_back():
    x = torch.randn(8, 3, dtype=torch.bfloat16, requires_grad=True)
    parts = [
        torch.randn(s, requires_grad=True) for s in [(3, 4, 1), (3, 4, 1), (3, 1, 4), (3, 1, 1)]
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scalar_mlps(x, *parts)
    out.sum().backward()
    assert out.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(out, scalar_mlps(x.float(), *parts))
