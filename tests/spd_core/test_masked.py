"""Masked activations against the formula, and drawn masks against those that are written down."""

import pytest
import torch

from spd_core.fast import native
from spd_core.fast.hashed import uniform
from spd_core.fast.masked import LazyMask, masked_product
from spd_core.randomness import Stream
from spd_core.rows import Rows

needs_loops = pytest.mark.skipif(native.library() is None, reason="no C compiler")


def masked(acts, mask, m_d):
    """Masked activations: the product with U = 1."""
    return masked_product(acts, torch.eye(acts.shape[-1], dtype=acts.dtype), mask, m_d)


def draw():
    return Stream((0, "test"), torch.tensor(3), 2, 4, None).next()


def numbers(width):
    """Those that `draw` stands for."""
    return Stream((0, "test"), torch.tensor(3), 2, 4, None).uniform(5, width)


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


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("with_delta", [True, False])
def test_a_drawn_mask_is_the_one_that_its_numbers_give(with_delta):
    acts, ci = (torch.randn(4, 5, 3).requires_grad_() for _ in range(2))
    r = numbers(4 if with_delta else 3)
    explicit = ci + (1 - ci) * r[..., :3]
    wanted, wanted_m_d = masked(acts, explicit, r[..., 3] if with_delta else None)
    got, m_d = masked(acts, LazyMask(ci, draw(), with_delta, None), None)
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


@needs_loops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("kind", ["drawn", "shared"])
def test_at_some_positions_a_mask_has_their_numbers(dtype, with_delta, kind):
    """And what fills the rows up to a round number has no gradient."""
    n, width = 400, 8 if with_delta else 7
    stream = Stream(("test",), torch.tensor(3), 2, n, None)
    source, rows = stream.next(), Rows.of(torch.rand(n, 5) < 0.6)
    r = uniform(source, (5, width)).flatten(0, 1)[rows.index]
    if kind == "shared":
        source = torch.rand(1, 1, width, requires_grad=True)
        r = source[0].expand(len(rows.index), -1)
    ci = torch.rand(n, 5, 7, requires_grad=True)
    acts = torch.randn(len(rows.index), 7).to(dtype).requires_grad_()
    at = ci.flatten(0, 1)[rows.index]
    wanted = acts.float() * (at + (1 - at) * r[:, :7] - (r[:, 7:] if with_delta else 0))
    up = torch.randn(len(rows.index), 7).to(dtype)
    up[rows.n :] = 0
    leaves, bounds = (acts, ci), {"rtol": 1e-4, "atol": 1e-5}
    if kind == "shared":
        leaves += (source,)
    if dtype != torch.float32:
        bounds = {"rtol": 1e-2, "atol": 1e-2}
    expected, before = torch.autograd.grad(wanted, leaves, up.float()), torch.get_num_threads()
    bits = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        got, m_d = masked(acts, LazyMask(ci, source, with_delta, rows), None)
        found = torch.autograd.grad(got, leaves, up)
        bits.append([got, *found])
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted.to(dtype), **bounds)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, **bounds)
        if with_delta:
            assert torch.equal(m_d.expand(len(r), 1), r[:, 7:])
    torch.set_num_threads(before)
    for other in bits[1:]:
        assert all(map(torch.equal, bits[0], other))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("kind", ["drawn", "shared"])
def test_neither_masks_nor_masked_activations_are_kept(kind):
    acts, ci, U = torch.randn(4, 5, 30), torch.rand(4, 5, 30), torch.randn(30, 2)
    source = draw() if kind == "drawn" else torch.rand(1, 1, 31)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        leaves = (x.clone().requires_grad_() for x in (acts, ci, U))
        acts, ci, U = leaves
        masked_product(acts, U, LazyMask(ci, source, True, None), None)
    large = [x for x in kept if x.numel() >= acts.numel()]
    assert {x.data_ptr() for x in large} == {acts.data_ptr(), ci.data_ptr()}


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("kind", ["drawn", "shared"])
@pytest.mark.parametrize("with_delta", [True, False])
def test_gradients_of_the_product(kind, with_delta):
    """Against autograd of the formula, in double precision; a shared source may learn too."""
    acts, ci, U, up = (torch.randn(s) for s in [(4, 5, 3), (4, 5, 3), (3, 2), (4, 5, 2)])
    r, leaves = numbers(4 if with_delta else 3), [acts, ci, U]
    if kind == "shared":
        leaves.append(r := torch.rand(1, 1, r.shape[-1]))
    leaves = [x.requires_grad_() for x in leaves]
    source = draw() if kind == "drawn" else r
    got, _ = masked_product(acts, U, LazyMask(ci, source, with_delta, None), None)
    found = torch.autograd.grad(got, leaves, up)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    r = exact[3] if kind == "shared" else r.double()
    m_d = r[..., 3:] if with_delta else 0
    wanted = (exact[0] * (exact[1] + (1 - exact[1]) * r[..., :3] - m_d)) @ exact[2]
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, torch.autograd.grad(wanted, exact, up.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("either_way")
def test_under_autocast_weights_are_kept_in_their_own_precision():
    """A copy for each of many passes would be kept."""
    acts, ci, U = torch.randn(4, 5, 3).bfloat16(), torch.rand(4, 5, 3), torch.randn(3, 2)
    U.requires_grad_()
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        out, _ = masked_product(acts, U, LazyMask(ci, draw(), True, None), None)
    assert out.dtype == torch.bfloat16 and U.data_ptr() in {x.data_ptr() for x in kept}
    assert not [x for x in kept if x.shape == U.shape and x.dtype == torch.bfloat16]
    (grad,) = torch.autograd.grad(out.sum(), U)
    r = numbers(4).double()
    masked = acts.double() * (ci.double() + (1 - ci.double()) * r[..., :3] - r[..., 3:])
    wanted = masked.flatten(0, 1).sum(0)[:, None].expand(3, 2)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad.double(), wanted, rtol=2e-2, atol=2e-2)


def test_operators_may_be_differentiated_twice(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    acts, ci, U = (torch.rand(s).double() for s in [(4, 5, 3), (4, 5, 3), (3, 2)])
    for source in (draw(), torch.rand(1, 1, 4).double()):
        assert torch.autograd.gradgradcheck(
            lambda *x, source=source: masked_product(
                x[0], x[2], LazyMask(x[1], source, True, None), None
            )[0],
            [x.requires_grad_() for x in (acts, ci, U)],
        )


@needs_loops
def test_the_delta_of_a_shared_source_has_its_gradient():
    """Through both of its places, (m - m_d) and m_d y."""
    ci, source = torch.rand(6, 4), torch.rand(1, 5, requires_grad=True)
    acts, y = torch.randn(6, 4), torch.randn(6, 3)
    out, m_d = masked(acts, LazyMask(ci, source, True, None), None)
    (got,) = torch.autograd.grad(((out[:, :3] + m_d * y) ** 2).sum(), source)
    m, d = ci + (1 - ci) * source[:, :4], source[:, 4:]
    (wanted,) = torch.autograd.grad((((acts * (m - d))[:, :3] + d * y) ** 2).sum(), source)
    torch.testing.assert_close(got, wanted)


@needs_loops
def test_bfloat16_is_rounded_to_the_nearest_and_nan_stays():
    stream = Stream(("test",), torch.tensor(1), 0, 1, None)
    acts = torch.tensor([1.0, -3.140625, float("nan"), float("inf"), 1e-40])[:, None].bfloat16()
    stream_of_5 = Stream(("test",), torch.tensor(1), 0, 5, None)
    got, _ = masked(acts, LazyMask(torch.ones(5, 1), stream_of_5.next(), False, None), None)
    torch.testing.assert_close(got, acts, rtol=0, atol=0, equal_nan=True)
    acts, drawn = (4 * torch.rand(1, 2000)).bfloat16(), stream.next()
    got, _ = masked(acts, LazyMask(torch.zeros(1, 2000), drawn, False, None), None)
    assert torch.equal(got, (acts.float() * uniform(drawn, (2000,))).bfloat16())


def test_what_runs_once_for_all_examples_is_masked_for_each():
    acts, ci = torch.randn(1, 5, 3, requires_grad=True), torch.rand(4, 5, 3)
    got, m_d = masked(acts, LazyMask(ci, draw(), True, None), None)
    wanted, _ = masked(acts.expand(4, -1, -1), LazyMask(ci, draw(), True, None), None)
    assert got.shape == (4, 5, 3) and torch.equal(got, wanted) and m_d.shape == (4, 5, 1)
    up = torch.randn(4, 5, 3)
    (grad,) = torch.autograd.grad(got, acts, up)
    assert torch.equal(grad, torch.autograd.grad(wanted, acts, up)[0])


@needs_loops
def test_second_derivatives_of_a_loop_are_refused():
    acts, ci = torch.rand(4, 5, 3, requires_grad=True), torch.rand(4, 5, 3)
    out, _ = masked(acts, LazyMask(ci, draw(), True, None), None)
    (grad,) = torch.autograd.grad(out.square().sum(), acts, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
