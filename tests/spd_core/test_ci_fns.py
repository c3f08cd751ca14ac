import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import erf, expit

from spd_core.ci_fns import CiFn, apply_sigmoid, lower_leaky_hard, upper_leaky_hard
from spd_core.config import CiFnConfig

X = [-2.0, -0.3, 0.0, 0.4, 1.0, 1.5, 11.0]


def gradient(function, x, grad_out):
    x = torch.tensor(x, requires_grad=True)
    (function(x) * torch.tensor(grad_out)).sum().backward()
    return x.grad.tolist()


@given(st.floats(-20, 20, width=32))
def test_leaky_hard_values(x):
    t = torch.tensor([x])
    assert lower_leaky_hard(t).item() == min(max(x, 0.0), 1.0)
    wanted = 1 + 0.01 * (x - 1) if x > 1 else max(x, 0.0)
    assert upper_leaky_hard(t).item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("grad, below", [(-2.0, -0.02), (2.0, 0.0)])
def test_lower_leaky_gradient_leaks_only_where_descent_raises_x(grad, below):
    got = gradient(lower_leaky_hard, X, [grad] * len(X))
    assert got == pytest.approx([below, below, below, grad, grad, 0.0, 0.0])


@pytest.mark.parametrize("grad", [-2.0, 2.0])
def test_upper_leaky_gradient(grad):
    got = gradient(upper_leaky_hard, [-2.0, -0.3, 0.4, 0.9, 1.5, 11.0], [grad] * 6)
    assert got == pytest.approx([0, 0, grad, grad, 0.01 * grad, 0.01 * grad])


def test_gradients_of_one_call_do_not_mix():
    got = gradient(lower_leaky_hard, [-1.0, -1.0, 0.5], [-1.0, 1.0, 3.0])
    assert got == pytest.approx([-0.01, 0.0, 3.0])


REFERENCE = {
    "normal": expit,
    "hard": lambda x: np.clip(x, 0, 1),
    "swish_hard": lambda x: np.clip(x * expit(10 * x), 0, 1),
}


@pytest.mark.parametrize("sigmoid", REFERENCE)
def test_other_sigmoids_use_one_function_for_both_values(sigmoid):
    g = torch.tensor(X)
    ci = apply_sigmoid(g, sigmoid, None)
    np.testing.assert_allclose(ci.lower, REFERENCE[sigmoid](np.array(X)), atol=1e-6)
    np.testing.assert_allclose(ci.upper, ci.lower)
    assert torch.equal(ci.pre_sigmoid, g)


@pytest.mark.parametrize("sigmoid", ["leaky_hard", "normal", "hard", "swish_hard"])
def test_binomial_noise_moves_lower_only(sigmoid):
    g, u = torch.rand(50) * 3 - 1, torch.rand(50)
    noisy, plain = apply_sigmoid(g, sigmoid, u), apply_sigmoid(g, sigmoid, None)
    assert torch.equal(noisy.upper, plain.upper)
    shifted = apply_sigmoid(1.05 * g - 0.05 * u, sigmoid, None)
    torch.testing.assert_close(noisy.lower, shifted.lower)


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


@pytest.mark.parametrize("kind", ["mlp", "vector_mlp", "shared_mlp"])
@pytest.mark.parametrize("hidden", [[4], [3, 2], [1, 2]])
def test_ci_fn_against_loops(kind, hidden):
    C, d_in = 3, 5
    ci_fn = CiFn(CiFnConfig(kind=kind, hidden=hidden), C, d_in, torch.Generator().manual_seed(0))
    for parameter in ci_fn.parameters():
        torch.nn.init.normal_(parameter)
    weights = [w.detach().numpy() for w in ci_fn.mlp.weights]
    biases = [b.detach().numpy() for b in ci_fn.mlp.biases]
    x, acts = torch.randn(2, 4, d_in), torch.randn(2, 4, C)
    got = ci_fn(x, acts).detach().numpy()
    for place in np.ndindex(2, 4):
        for c in range(C):
            h = {"mlp": acts[*place, c : c + 1], "vector_mlp": x[place], "shared_mlp": x[place]}
            h = h[kind].numpy()
            for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
                w, b = (w, b) if kind == "shared_mlp" else (w[c], b[c, :, 0])
                h = w @ h + b
                h = gelu(h) if layer < len(hidden) else h
            wanted = h[c] if kind == "shared_mlp" else h[0]
            assert got[*place, c] == pytest.approx(wanted, abs=1e-4)


def test_mlp_of_a_subcomponent_sees_only_its_own_activation():
    ci_fn = CiFn(CiFnConfig(kind="mlp", hidden=[4]), 3, 5, torch.Generator().manual_seed(0))
    acts = torch.randn(8, 3, requires_grad=True)
    ci_fn(torch.randn(8, 5), acts)[:, 1].sum().backward()
    assert (acts.grad[:, [0, 2]] == 0).all() and (acts.grad[:, 1] != 0).all()
