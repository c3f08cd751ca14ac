"""The compiled loops against the plain formula in double precision."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import erf

from spd_core.ci_fns import CausalImportance
from spd_core.data.batches import Batch, Decomposition, training_batches
from spd_core.fast.leaky_hard import upper_leaky_hard
from spd_core.fast.native import library, lower_leaky_hard, power_sums, scalar_mlps
from spd_core.losses import minimality
from spd_core.randomness import StepRandomness
from spd_core.step import accumulate_gradients, scheduled

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")


def draw(C, hidden, n, scale=1.0):
    shapes = [(n, C), (C, hidden, 1), (C, hidden, 1), (C, 1, hidden), (C, 1, 1)]
    return [(scale * torch.randn(shape)).requires_grad_() for shape in shapes]


def plain(x, w1, b1, w2, b2):
    """Values, and the gradients of sum(values * g) by the chain rule written out."""
    x, w1, b1, w2, b2 = (t.detach().double().numpy() for t in (x, w1, b1, w2, b2))
    x = x.T
    z = w1 * x[:, None] + b1
    cdf, density = (1 + erf(z / np.sqrt(2))) / 2, np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    values = (np.einsum("ck,ckn->cn", w2[:, 0], z * cdf) + b2[:, 0]).T

    def gradients(g):
        g = g.T
        gz = g[:, None] * w2.transpose(0, 2, 1) * (cdf + z * density)
        return [
            (w1 * gz).sum(1).T,
            (gz * x[:, None]).sum(2, keepdims=True),
            gz.sum(2, keepdims=True),
            (g[:, None] * z * cdf).sum(2)[:, None],
            g.sum(1)[:, None, None],
        ]

    return values, gradients


@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 200), st.sampled_from([0.1, 1, 5]))
def test_values_and_gradients_are_those_of_the_formula(C, hidden, n, scale):
    arguments = draw(C, hidden, n, scale)
    values, gradients = plain(*arguments)
    got = scalar_mlps(*arguments)
    assert np.abs(got.detach().numpy() - values).max() < 1e-5 * max(1, np.abs(values).max())
    g = torch.randn(n, C)
    got.backward(g)
    for argument, wanted in zip(arguments, gradients(g.double().numpy()), strict=True):
        assert np.abs(argument.grad.numpy() - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())


def test_far_from_zero_gelu_is_zero_or_the_identity():
    x = torch.tensor([[-1e4], [-30.0], [-13.5], [13.5], [30.0], [1e4]], requires_grad=True)
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    out = scalar_mlps(x, one, zero, one, zero)
    torch.testing.assert_close(out, x.clamp(min=0))
    out.sum().backward()
    torch.testing.assert_close(x.grad, (x > 0).float())


def test_the_number_of_threads_changes_no_bit():
    arguments, results = draw(7, 16, 333), []
    before = torch.get_num_threads()
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        out = scalar_mlps(*arguments)
        results.append([out, *torch.autograd.grad(out.square().sum(), arguments)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_examples_and_no_contiguous_memory():
    assert scalar_mlps(*draw(3, 4, 0)).shape == (0, 3)
    x, *weights = draw(3, 4, 5)
    torch.testing.assert_close(scalar_mlps(x.T.contiguous().T, *weights), scalar_mlps(x, *weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(st.integers(0, 300))
def test_lower_leaky_hard_and_its_gradient(dtype, n):
    x, up = (2 * torch.randn(n)).to(dtype), torch.randn(n)
    x.requires_grad_()
    lower = lower_leaky_hard(x)
    lower.backward(up)
    v, g = x.detach().double().numpy(), up.double().numpy()
    assert lower.dtype == torch.float32 and x.grad.dtype == dtype
    np.testing.assert_allclose(lower.detach(), np.clip(v, 0, 1), atol=1e-6)
    wanted = np.select([v <= 0, v <= 1], [0.01 * np.minimum(g, 0), g], 0)
    rtol = 1e-6 if dtype == torch.float32 else 2**-8
    np.testing.assert_allclose(x.grad.double(), wanted, rtol=rtol)


@pytest.mark.parametrize("sampling", ["continuous", "binomial"])
def test_without_a_compiler_pytorchs_operators_give_the_same(
    sampling, make_config, tms_model, monkeypatch, one_process
):
    config = make_config(f"decompose.sampling={sampling}", "data.feature_probability=0.3")
    model = tms_model(f"decompose.sampling={sampling}")
    found = []
    for compiler in ("cc", "no-such-compiler"):
        monkeypatch.setenv("CC", compiler)
        library.cache_clear()
        if compiler == "cc":
            assert library() is not None
        else:
            with pytest.warns(UserWarning, match="steps take longer"):
                assert library() is None
        d = Decomposition(config, model, one_process, None)
        model.zero_grad()
        batches, n_micro = training_batches(d, 0)
        losses, _, _ = accumulate_gradients(
            d, batches, n_micro, scheduled(config, 0), lambda _batch: {}
        )
        found.append(losses | {n: p.grad for n, p in model.trained_parameters().items()})
    monkeypatch.undo()
    library.cache_clear()
    for name, compiled in found[0].items():
        torch.testing.assert_close(compiled, found[1][name], atol=1e-5, rtol=1e-4)


def test_without_a_compiler_powers_are_summed_in_float32_under_autocast(monkeypatch):
    g = torch.rand(3001, 20)
    ci, x = {"a": CausalImportance(g, g, "leaky_hard")}, torch.zeros(3001, 1)
    batch = Batch(x, x, {}, ci, StepRandomness(0, 0, 0, 1, 3001, x.device), {})
    monkeypatch.setenv("CC", "no-such-compiler")
    library.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="longer"):
        sums = minimality.power_sums(batch, 0.9)
    monkeypatch.undo()
    library.cache_clear()
    wanted = [*((g.double().numpy() + 1e-12) ** 0.9).sum(0), 3001]
    assert sums.dtype == torch.float32
    np.testing.assert_allclose(sums, wanted, rtol=1e-5)


def test_what_is_not_a_number_shows():
    x = torch.tensor([[0.5, float("nan")], [float("nan"), 2.0]])
    assert lower_leaky_hard(x).isnan().equal(x.isnan())
    assert power_sums(x, 0.9, 1e-12, torch.ones(2)).isnan().all()


@pytest.mark.parametrize("corner", [0.0, 1.0])
def test_powers_pass_the_gradient_at_both_corners(corner):
    """At 0 is where importances start."""
    x, times = torch.full((3, 1), corner, requires_grad=True), torch.tensor([2.0, 3.0, 0.0])
    power_sums(x, 1.0, 1e-12, times).backward(torch.ones(1))
    assert x.grad[:, 0].tolist() == pytest.approx([2.0, 3.0, 0.0])
    by_operators = x.detach().clone().requires_grad_()
    (times[:, None] * upper_leaky_hard(by_operators)).sum().backward()
    torch.testing.assert_close(x.grad, by_operators.grad)


def test_where_nothing_can_be_written_the_run_ends():
    """Without the loops it would go on, but round otherwise than before."""
    limited = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (1000, 1000))\n"
    code = limited + "from spd_core.fast import native; native.library()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "OSError: [Errno 27] File too large" in done.stderr


@given(st.integers(1, 24).map(lambda eighths: eighths / 8))
def test_powers_of_all_magnitudes(p):
    """Also of numbers as small as eps, whose logarithms are large; p - 1 is exact in float32."""
    x = torch.cat([torch.zeros(1, 1), 10 ** (-13 * torch.rand(1, 300)).T])
    assert_sums_and_gradients(x.T, p, rtol=1e-6)


@given(
    st.integers(1, 90),
    st.integers(1, 600),
    st.floats(0.1, 3).map(lambda p: float(np.float32(p))),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([(0, 1.2), (-1, 2)]),
)
def test_power_sums_and_gradients_are_those_of_the_formula(C, n, p, share_of_zeros, ends):
    """Also at 0, where the powers of eps are far from those of the next number."""
    x = (ends[0] + (ends[1] - ends[0]) * torch.rand(n, C)) * (torch.rand(n, C) >= share_of_zeros)
    assert_sums_and_gradients(x, p)


def assert_sums_and_gradients(x, p, rtol=3e-6):
    (n, C), x = x.shape, x.requires_grad_()
    times, g, eps = torch.randint(1, 5, (n,)).float(), torch.randn(C), 1e-12
    got = power_sums(x, p, eps, times)
    got.backward(g)
    # float32 is what the sum x + eps is made in
    v = x.detach()
    shifted = (v.clamp(0, 1) + 0.01 * (v - 1).clamp(min=0) + eps).double().numpy()
    wanted = times.double().numpy() @ shifted**p
    np.testing.assert_allclose(got.detach(), wanted, rtol=rtol)
    slope = np.select([v < 0, v < 1], [0, 1], 0.01)
    gradient = slope * times[:, None].numpy() * p * shifted ** (p - 1) * g.numpy()
    np.testing.assert_allclose(x.grad, gradient, rtol=rtol)
