import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from spd_core.fast import leaky_hard, native
from spd_core.fast.leaky_hard import lower_leaky_hard, upper_leaky_hard

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


def check_what_is_kept(dtype):
    x, kept = torch.tensor(X, dtype=dtype, requires_grad=True), []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lower = lower_leaky_hard(x)
    assert {t.data_ptr() for t in kept} == {x.data_ptr()}
    assert lower.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    lower.backward(torch.full((len(X),), -2.0, dtype=lower.dtype))
    assert x.grad.dtype == dtype
    assert x.grad.tolist() == pytest.approx([-0.02, -0.02, -0.02, -2, -2, 0, 0], rel=2**-8)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_lower_one_keeps_only_its_input(dtype):
    check_what_is_kept(dtype)


@pytest.mark.slow
def test_compiled_it_keeps_only_its_input_too(monkeypatch):
    """A compiler by itself chooses two comparisons, a byte each, which nothing else needs."""

    def compiled(function, _device):
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    torch.compiler.reset()
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(leaky_hard, "fused", compiled)
    check_what_is_kept(torch.bfloat16)
