import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spd_core.components import LinearComponents, tie


def linear_components(d_in, d_out, C, bias=True):
    return LinearComponents(nn.Linear(d_in, d_out, bias), C, torch.Generator().manual_seed(0))


def dense(c, x, mask, delta):
    """Masked output from the definition: one dense matrix per position."""
    V, U, W = (t.detach().double().numpy() for t in (c.V, c.U, c.weight))
    b = 0 if c.bias is None else c.bias.double().numpy()
    out = np.empty((*x.shape[:-1], len(W)))
    for i in np.ndindex(*x.shape[:-1]):
        rank_ones = [mask[*i, k].item() * np.outer(U[k], V[:, k]) for k in range(len(U))]
        missing = W - sum(np.outer(U[k], V[:, k]) for k in range(len(U)))
        out[i] = (sum(rank_ones) + delta[i].item() * missing) @ x[i].double().numpy() + b
    return out


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 7), st.booleans(), st.booleans())
def test_masked_output_against_dense_matrices(d_in, d_out, C, bias, with_delta):
    c = linear_components(d_in, d_out, C, bias)
    x, mask, delta = torch.randn(2, 3, d_in), torch.rand(2, 3, C), torch.rand(2, 3)
    y = torch.nn.functional.linear(x, c.weight, c.bias)
    got = c(x, y, mask, delta if with_delta else None)
    wanted = dense(c, x, mask, delta if with_delta else torch.zeros(2, 3))
    np.testing.assert_allclose(got.detach(), wanted, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", [torch.ones(9, 7), None])
def test_all_ones_with_delta_is_the_target(bias, mask):
    c = linear_components(5, 4, 7, bias)
    x = torch.randn(9, 5)
    y = torch.nn.functional.linear(x, c.weight, c.bias)
    torch.testing.assert_close(c(x, y, mask, torch.ones(9)), y, atol=1e-5, rtol=0)


def test_no_mask_is_all_ones():
    c = linear_components(5, 4, 7)
    x, y = torch.randn(9, 5), torch.randn(9, 4)
    torch.testing.assert_close(c(x, y, None, None), c(x, y, torch.ones(9, 7), None))
    delta = torch.rand(9)
    torch.testing.assert_close(c(x, y, None, delta), c(x, y, torch.ones(9, 7), delta))


def test_initial_variances_and_what_is_trained():
    c = linear_components(200, 50, 100)
    assert c.V.std().item() == pytest.approx(200**-0.5, rel=0.05)
    assert c.U.std().item() == pytest.approx(100**-0.5, rel=0.05)
    assert dict(c.named_parameters()).keys() == {"V", "U"}
    assert not c.weight.requires_grad and not c.bias.requires_grad


def test_weight_error():
    c = linear_components(5, 4, 7)
    wanted = c.weight.numpy() - (c.V @ c.U).detach().numpy().T
    np.testing.assert_allclose(c.weight_error().detach(), wanted, atol=1e-6)


def test_tied_components_start_as_transposes():
    first, second = linear_components(5, 2, 7), linear_components(2, 5, 7)
    tie(first, second)
    torch.testing.assert_close((first.V @ first.U).T, second.V @ second.U)
    first.V.data.zero_()
    assert second.U.abs().sum() > 0, "they only start equal"


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 4, 7)])
def test_tie_needs_transposed_shapes(shape):
    with pytest.raises(ValueError, match="tie"):
        tie(linear_components(5, 2, 7), linear_components(*shape))
