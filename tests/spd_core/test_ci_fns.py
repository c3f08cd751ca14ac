import numpy as np
import pytest
import torch
from scipy.special import erf, expit
from torch import nn

from spd_core.ci_fns import CiFn, apply_sigmoid
from spd_core.component_model import ComponentModel
from spd_core.config import CiFnConfig
from spd_core.fast import native
from spd_core.randomness import StepRandomness

X = [-2.0, -0.3, 0.0, 0.4, 1.0, 1.5, 11.0]


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


def importances(model, inputs, noise=None):
    return model.causal_importances(inputs, noise, "off")[0]


KINDS = ("mlp", "vector_mlp", "shared_mlp")
SIGMOIDS = (*REFERENCE, "leaky_hard")


def by_hand(ci_fn, x, acts):
    """The pre-sigmoid values, one position and one subcomponent at a time."""
    for parameter in ci_fn.parameters():
        nn.init.normal_(parameter)
    weights = [w.detach().numpy() for w in ci_fn.weights]
    biases = [b.detach().numpy() for b in ci_fn.biases]
    g = np.empty(acts.shape)
    for *place, c in np.ndindex(acts.shape):
        h = acts[*place, c : c + 1] if ci_fn.kind == "mlp" else x[*place]
        for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
            mlp = 0 if ci_fn.kind == "shared_mlp" else c
            h = w[mlp] @ h + b[mlp, :, 0]
            h = gelu(h) if layer < len(weights) - 1 else h
        g[*place, c] = h[c] if ci_fn.kind == "shared_mlp" else h[0]
    return g


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [[4], [3, 2], [1, 2]])
@pytest.mark.parametrize("positions", [(7,), (2, 4)])
def test_ci_fn_against_loops(kind, hidden, positions):
    ci_fn = CiFn(CiFnConfig(kind=kind, hidden=hidden), 3, 5, torch.Generator().manual_seed(0))
    x, acts = torch.randn(*positions, 5), torch.randn(*positions, 3)
    wanted = by_hand(ci_fn, x.numpy(), acts.numpy())
    np.testing.assert_allclose(ci_fn(x, acts).detach(), wanted, atol=1e-4)


@pytest.fixture
def decompose(make_config):
    def build(target, modules, kind="mlp", **update):
        ci_fn = CiFnConfig(kind=kind, hidden=[4])
        update = {"modules": modules, "tied": [], "ci_fn": ci_fn, **update}
        return ComponentModel(target, make_config().decompose.model_copy(update=update), 0)

    return build


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_zeros", [0, 3, 12, 15])
def test_importances_of_a_sequence_some_of_whose_positions_are_zero(kind, n_zeros, decompose):
    model, x = decompose(nn.Linear(5, 2), {"*": 3}, kind), torch.randn(15, 5)
    x[torch.randperm(15)[:n_zeros]] = 0
    x = x.view(5, 3, 5)
    acts = x.numpy() @ model.components[""].V.detach().numpy()
    wanted = by_hand(model.ci_fns[""], x.numpy(), acts)
    ci = importances(model, {"": x})[""]
    np.testing.assert_allclose(ci.pre_sigmoid.detach(), wanted, atol=1e-4)


def lower_by_hand(sigmoid, g):
    return np.clip(g, 0, 1) if sigmoid == "leaky_hard" else REFERENCE[sigmoid](g)


def upper_by_hand(sigmoid, g):
    leaky = np.where(g > 1, 1 + 0.01 * (g - 1), np.clip(g, 0, 1))
    return leaky if sigmoid == "leaky_hard" else REFERENCE[sigmoid](g)


@pytest.mark.parametrize("sigmoid", SIGMOIDS)
@pytest.mark.parametrize("sampling", ["continuous", "binomial"])
def test_importances_of_embeddings_and_sequences(sigmoid, sampling, decompose):
    """Under binomial sampling alone, `lower` is jittered, by numbers of the stream in order."""

    def stream():
        return StepRandomness(0, 0, 0, 1, 8, torch.device("cpu")).batch_stream("jitter")

    target = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    model = decompose(target, {"0": 5, "1": 6}, sigmoid=sigmoid, sampling=sampling)
    tokens, draws = torch.randint(9, (8, 7)), stream()
    embedding, linear = (c.V.detach().numpy() for c in model.components.values())
    vectors = target[0].weight.numpy()[tokens]
    acts = {"0": embedding[tokens], "1": vectors @ linear}
    g = {name: by_hand(model.ci_fns[name], vectors, a) for name, a in acts.items()}
    ci = importances(model, model.run_target(tokens)[1], stream())
    for name, values in g.items():
        u = draws.uniform(7, values.shape[-1]).numpy()
        jittered = 1.05 * values - 0.05 * u if sampling == "binomial" else values
        lower, upper = ci[name].lower.detach(), ci[name].upper.detach()
        np.testing.assert_allclose(lower, lower_by_hand(sigmoid, jittered), atol=1e-4)
        np.testing.assert_allclose(upper, upper_by_hand(sigmoid, values), atol=1e-4)


@pytest.mark.parametrize("kind", ["vector_mlp", "shared_mlp"])
def test_an_embedding_takes_no_other_kind_than_mlp(kind, decompose):
    target = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=f"{kind}: '0' is an embedding"):
        decompose(target, {"*": 5}, kind)
    decompose(target, {"1": 5}, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_importances_are_float32_for_a_target_of_any_precision(kind, dtype, decompose):
    model, x = decompose(nn.Linear(5, 2).to(dtype), {"*": 3}, kind), torch.randn(6, 5)
    ci = importances(model, {"": x.to(dtype)})[""]
    wanted = importances(model, {"": x.to(dtype).float()})[""]
    assert ci.lower.dtype == ci.upper.dtype == torch.float32
    assert torch.equal(ci.pre_sigmoid, wanted.pre_sigmoid)


@pytest.mark.parametrize("kind", KINDS)
def test_importances_under_autocast_are_float32_and_close(kind, decompose):
    model, x = decompose(nn.Linear(5, 2), {"*": 3}, kind), torch.randn(6, 5)
    wanted = importances(model, {"": x})[""]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ci = importances(model, {"": x})[""]
    assert ci.lower.dtype == ci.upper.dtype == torch.float32
    torch.testing.assert_close(ci.pre_sigmoid.float(), wanted.pre_sigmoid, atol=0.05, rtol=0.05)


def test_scalar_mlps_in_a_loop_are_float32_under_autocast(decompose):
    assert native.library() is not None
    model, x = decompose(nn.Linear(50, 20), {"*": 30}, "mlp"), torch.randn(60, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        acts = model.components[""].inner_acts(x)
        wanted = by_hand(model.ci_fns[""], None, acts.detach().float().numpy())
        ci = importances(model, {"": x})[""]
    assert acts.dtype == torch.bfloat16
    np.testing.assert_allclose(ci.pre_sigmoid.detach(), wanted, atol=1e-5)


def test_mlp_of_a_subcomponent_sees_only_its_own_activation():
    ci_fn = CiFn(CiFnConfig(kind="mlp", hidden=[4]), 3, 5, torch.Generator().manual_seed(0))
    acts = torch.randn(8, 3, requires_grad=True)
    ci_fn(torch.randn(8, 5), acts)[:, 1].sum().backward()
    assert (acts.grad[:, [0, 2]] == 0).all() and (acts.grad[:, 1] != 0).all()
