import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from spd_core.components import LinearComponents
from spd_core.config.metrics import DensePattern, IdentityPattern
from spd_core.metrics.solutions import (
    identity_ci_error,
    mmcs_ml2r,
    permute_to_identity,
    single_feature_ci,
)

IDENTITY = IdentityPattern(kind="identity", n=4)


def solution(C, order):
    ci = torch.zeros(4, C)
    ci[range(4), list(order)] = 1.0
    return ci


@given(st.permutations(range(6)), st.floats(-0.09, 0.09))
def test_a_permuted_identity_within_tolerance_has_no_error(order, noise):
    ci = (solution(6, order[:4]) + noise * torch.rand(4, 6).sign()).clamp(0, 1)
    assert identity_ci_error(ci, IDENTITY, 0.1) == 0
    assert permute_to_identity(ci).diagonal().min() > 0.9


@given(st.permutations(range(6)), st.integers(0, 3))
def test_every_wrong_entry_counts_once(order, row):
    ci = solution(6, order[:4])
    ci[row, order[row]] = 0.85  # an entry that is too small
    ci[row, order[4]] = 0.15  # and one that should not be there
    assert identity_ci_error(ci, IDENTITY, 0.1) == 2
    assert identity_ci_error(ci, IDENTITY, 0.2) == 0


def test_a_missing_and_a_shared_subcomponent():
    ci = solution(6, range(4))
    ci[3] = 0
    assert identity_ci_error(ci, IDENTITY, 0.1) == 1
    ci[3, 2] = 1  # features 2 and 3 on the same subcomponent: (3, 3) is missing, (3, 2) is surplus
    assert identity_ci_error(ci, IDENTITY, 0.1) == 2
    assert identity_ci_error(torch.zeros(4, 6), IDENTITY, 0.1) == 4
    assert identity_ci_error(torch.ones(4, 6), IDENTITY, 0.1) == 4 * 5


def test_fewer_subcomponents_than_features_cannot_be_right():
    ci = torch.eye(4)[:, :3]
    assert identity_ci_error(ci, IDENTITY, 0.1) == 1


@given(st.integers(0, 6))
def test_dense_wants_exactly_k_columns(active):
    ci = torch.zeros(4, 6)
    ci[1, :active] = 0.5
    for k in range(1, 7):
        assert identity_ci_error(ci, DensePattern(kind="dense", k=k), 0.1) == abs(active - k)


def test_single_features_go_in_at_three_quarters(tms_model):
    model = tms_model("decompose.ci_fn.kind=shared_mlp")
    got = single_feature_ci(model, 5)
    x = 0.75 * torch.eye(5)
    for name, inputs in {"linear1": x, "linear2": x @ model.target.linear1.weight.T}.items():
        g = model.ci_fns[name](inputs, model.components[name].inner_acts(inputs))
        torch.testing.assert_close(got[name], g.detach().clamp(0, 1))


def components(W, V, U):
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight.data = torch.as_tensor(W, dtype=torch.float32)
    result = LinearComponents(linear, V.shape[1], torch.Generator().manual_seed(0))
    result.V.data = torch.as_tensor(V, dtype=torch.float32)
    result.U.data = torch.as_tensor(U, dtype=torch.float32)
    return result


def reference(W, V, U):
    """Loops over features and subcomponents, from the definition."""
    cosines, ratios = [], []
    for j in range(W.shape[1]):
        w = W[:, j]
        parts = [U[c] * V[j, c] for c in range(len(U))]
        sizes = [np.linalg.norm(p) / np.linalg.norm(w) for p in parts]
        pairs = zip(parts, sizes, strict=True)
        cos = [p @ w / (size * (w @ w)) if size >= 0.01 else 0.0 for p, size in pairs]
        cosines.append(max(cos))
        ratios.append(sizes[int(np.argmax(cos))])
    return np.mean(cosines), np.mean(ratios)


SIDES = ["features_in", "features_out"]


@given(st.integers(0, 100), st.sampled_from(SIDES))
def test_mmcs_and_ml2r(seed, side):
    rng = np.random.default_rng(seed)
    W, V, U = rng.normal(size=(2, 5)), rng.normal(size=(5, 6)), rng.normal(size=(6, 2))
    wanted = reference(W, V, U) if side == "features_in" else reference(W.T, U.T, V.T)
    assert mmcs_ml2r(components(W, V, U), side) == pytest.approx(wanted, rel=1e-3)
    signs, scales, order = rng.choice([-1, 1], 6), rng.uniform(0.2, 5, 6), rng.permutation(6)
    V2, U2 = (V * signs * scales)[:, order], (U * (signs / scales)[:, None])[order]
    assert mmcs_ml2r(components(W, V2, U2), side) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shrink", [1.0, 0.5])
def test_the_paper_solution_has_mmcs_one(shrink, side):
    W = np.random.default_rng(0).normal(size=(2, 5))
    V, U = np.eye(5)[:, [3, 1, 0, 2, 4]], W.T[[3, 1, 0, 2, 4]] * shrink
    W, V, U = (W, V, U) if side == "features_in" else (W.T, U.T, V.T)
    assert mmcs_ml2r(components(W, V, U), side) == pytest.approx((1.0, shrink), rel=1e-5)


def test_a_dead_subcomponent_that_points_the_right_way_does_not_count():
    W, V = np.array([[1.0], [0.0]]), np.array([[1e-3, 1.0]])
    U = np.array([[1.0, 0.0], [3.0, 4.0]])
    assert mmcs_ml2r(components(W, V, U), "features_in") == pytest.approx((0.6, 5.0))
