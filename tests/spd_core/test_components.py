import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spd_core.components import Identity, LinearComponents, is_decomposable, tie


def generator():
    return torch.Generator().manual_seed(0)


def linear_components(d_in, d_out, C, bias=True):
    return LinearComponents(nn.Linear(d_in, d_out, bias), C, generator())


def conv1d(d_in, d_out):
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(d_out, d_in)
    nn.init.normal_(module.bias)
    return module.requires_grad_(False)


def dense(W, b, c, x, mask, delta):
    """Masked output from the definition: one dense matrix per position."""
    V, U = (t.detach().double().numpy() for t in (c.V, c.U))
    out = np.empty((*x.shape[:-1], len(W)))
    for i in np.ndindex(*x.shape[:-1]):
        rank_ones = [mask[*i, k].item() * np.outer(U[k], V[:, k]) for k in range(len(U))]
        missing = W - sum(np.outer(U[k], V[:, k]) for k in range(len(U)))
        out[i] = (sum(rank_ones) + delta[i].item() * missing) @ x[i] + b
    return out


sizes = given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 7), st.booleans())


@sizes
@pytest.mark.parametrize("bias", [True, False])
def test_masked_output_against_dense_matrices(bias, d_in, d_out, C, with_delta):
    linear = nn.Linear(d_in, d_out, bias).requires_grad_(False)
    c = LinearComponents(linear, C, generator())
    x, mask, delta = torch.randn(2, 3, d_in), torch.rand(2, 3, C), torch.rand(2, 3)
    got = c(c.inner_acts(x), linear(x), mask, delta if with_delta else None)
    b = linear.bias.numpy() if bias else 0
    delta = delta if with_delta else torch.zeros(2, 3)
    wanted = dense(linear.weight.numpy(), b, c, x.numpy(), mask, delta)
    np.testing.assert_allclose(got.detach(), wanted, atol=1e-5)


@sizes
def test_masked_conv1d_against_dense_matrices(d_in, d_out, C, with_delta):
    module = conv1d(d_in, d_out)
    c = LinearComponents(module, C, generator())
    x, mask, delta = torch.randn(2, 3, d_in), torch.rand(2, 3, C), torch.rand(2, 3)
    got = c(c.inner_acts(x), module(x), mask, delta if with_delta else None)
    W, b = module.weight.numpy().T, module.bias.numpy()
    wanted = dense(W, b, c, x.numpy(), mask, delta if with_delta else torch.zeros(2, 3))
    assert c.V.shape == (d_in, C) and c.U.shape == (C, d_out)
    np.testing.assert_allclose(got.detach(), wanted, atol=1e-5)


@sizes
def test_masked_embedding_against_dense_matrices(n_tokens, d_embed, C, with_delta):
    module = nn.Embedding(n_tokens, d_embed, padding_idx=0).requires_grad_(False)
    c = LinearComponents(module, C, generator())
    tokens, mask, delta = torch.randint(n_tokens, (2, 3)), torch.rand(2, 3, C), torch.rand(2, 3)
    got = c(c.inner_acts(tokens), module(tokens), mask, delta if with_delta else None)
    one_hot, delta = np.eye(n_tokens)[tokens.numpy()], delta if with_delta else torch.zeros(2, 3)
    wanted = dense(module.weight.numpy().T, 0, c, one_hot, mask, delta)
    np.testing.assert_allclose(got.detach(), wanted, atol=1e-5)
    acts = [[c.V[t].tolist() for t in row] for row in tokens]
    np.testing.assert_allclose(c.inner_acts(tokens).detach(), acts)


@sizes
def test_masked_identity_against_dense_matrices(d, n, C, with_delta):
    c = LinearComponents(Identity(d), C, generator())
    x, mask, delta = torch.randn(2, n, d), torch.rand(2, n, C), torch.rand(2, n)
    got = c(c.inner_acts(x), x, mask, delta if with_delta else None)
    wanted = dense(np.eye(d), 0, c, x.numpy(), mask, delta if with_delta else torch.zeros(2, n))
    np.testing.assert_allclose(got.detach(), wanted, atol=1e-5)


def test_what_is_decomposable():
    yes = (nn.Linear(2, 3), nn.Embedding(2, 3), conv1d(2, 3))
    no = (nn.LayerNorm(2), nn.Conv1d(2, 3, 1), nn.Identity(), nn.EmbeddingBag(2, 3), Identity(2))
    assert all(map(is_decomposable, yes)) and not any(map(is_decomposable, no))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mask", [torch.ones(9, 7), None])
def test_all_ones_with_delta_is_the_target(bias, mask):
    linear = nn.Linear(5, 4, bias).requires_grad_(False)
    c = LinearComponents(linear, 7, generator())
    x = torch.randn(9, 5)
    out = c(c.inner_acts(x), linear(x), mask, torch.ones(9))
    torch.testing.assert_close(out, linear(x), atol=1e-5, rtol=0)


def test_no_mask_is_all_ones():
    c = linear_components(5, 4, 7)
    x, y = torch.randn(9, 5), torch.randn(9, 4)
    torch.testing.assert_close(
        c(c.inner_acts(x), y, None, None), c(c.inner_acts(x), y, torch.ones(9, 7), None)
    )
    delta = torch.rand(9)
    torch.testing.assert_close(
        c(c.inner_acts(x), y, None, delta), c(c.inner_acts(x), y, torch.ones(9, 7), delta)
    )


def test_initial_variances_and_what_is_trained():
    c = linear_components(200, 50, 100)
    assert c.V.std().item() == pytest.approx(200**-0.5, rel=0.05)
    assert c.U.std().item() == pytest.approx(100**-0.5, rel=0.05)
    assert dict(c.named_parameters()).keys() == {"V", "U"}
    assert not c.weight.requires_grad
    linear = nn.Linear(5, 4)
    c, x = LinearComponents(linear, 7, generator()), torch.randn(9, 5)
    c(c.inner_acts(x), linear(x).detach(), None, torch.rand(9)).sum().backward()
    assert c.U.grad is not None and linear.bias.grad is None


@pytest.mark.parametrize("make, d_in_first", [
    (lambda: nn.Linear(5, 4), False),
    (lambda: nn.Embedding(5, 4), True),
    (lambda: conv1d(5, 4), True),
])  # fmt: skip
def test_weight_error(make, d_in_first):
    module = make().requires_grad_(False)
    c = LinearComponents(module, 7, generator())
    W = module.weight.numpy().T if d_in_first else module.weight.numpy()
    V, U = c.V.detach().numpy(), c.U.detach().numpy()
    wanted = W - sum(np.outer(U[k], V[:, k]) for k in range(7))
    np.testing.assert_allclose(c.weight_error().detach(), wanted, atol=1e-6)


def test_weight_error_keeps_full_precision_under_autocast():
    c = linear_components(5, 4, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = c.weight_error()
    assert error.dtype == torch.float32 and torch.equal(error, c.weight_error())


def test_the_target_is_read_and_not_registered():
    linear = nn.Linear(5, 4)
    c = LinearComponents(linear, 7, generator())
    linear.weight.data.zero_()
    assert (c.weight == 0).all(), "the weight of the moment, wherever the target was moved to"
    assert list(c.modules()) == [c]


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
