import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from test_masks import written_down
from torch import nn

from spd_core.ci_fns import CausalImportance, apply_sigmoid
from spd_core.component_model import ComponentModel, MaskInfo
from spd_core.config.losses import (
    LossConfig,
    PGDReconConfig,
    SubsetReconConfig,
    UniformKSubsetConfig,
)
from spd_core.data.batches import Batch, Decomposition, training_batches
from spd_core.losses import loss_parts, prepare_step
from spd_core.losses.distance import distance, faithfulness
from spd_core.losses.minimality import importance_minimality, power_sums
from spd_core.randomness import StepRandomness
from spd_core.rows import at_rows
from spd_core.schedule import annealed_ps
from spd_core.targets.train_target import untrained_target
from spd_launch.compose import compose
from spd_launch.validate import validate

CPU = torch.device("cpu")
SHARED_PGD = PGDReconConfig(init="random", step_size=0.5, n_steps=2, scope="shared_across_batch")
SUBSET = UniformKSubsetConfig(kind="uniform_k_subset")
P_ALL = "+losses.{}={{coeff:1.0,routing:{{kind:static_probability,p:{}}}}}"


def importances(lower):
    return CausalImportance(lower, lower + 0.1, "leaky_hard")


def make_batch(model, x, lower):
    target_out, inputs = model.run_target(x)
    positions = x.shape[:-1] if x.is_floating_point() else x.shape
    ci = {n: importances(lower(*positions, c.C)) for n, c in model.components.items()}
    return Batch(x, target_out, inputs, ci, StepRandomness(0, 0, 0, 1, len(x), CPU), {})


def loss(name, make_config, model, batch, dist, *overrides):
    config = make_config(*overrides).losses.configured()[name]
    sum_, count = parts(name, config, model, batch, dist)
    return sum_.item() / count


def parts(name, config, model, batch, dist, position=0.0):
    d, losses = Decomposition(None, model, dist, None), {name: config}
    step = prepare_step(d, losses, lambda: [batch], 1, annealed_ps(losses, position))
    return loss_parts(name, config, batch, step)


def to_numpy(tensor):
    return tensor.detach().double().numpy()


def tms_numpy(model, x, masks):
    """The TMS and its modules' inputs, with a dense delta; `masks` holds masks or MaskInfos."""
    h, inputs = to_numpy(x), {}
    for name in ("linear1", "linear2"):
        c, linear = model.components[name], model.target.get_submodule(name)
        W, V, U = (to_numpy(t) for t in (linear.weight.T, c.V, c.U))
        bias = 0 if linear.bias is None else to_numpy(linear.bias)
        inputs[name], out = h, h @ W + bias
        if name in masks:
            info = masks[name]
            info = info if isinstance(info, MaskInfo) else MaskInfo(info, None, None)
            seen = h if info.rows is None else h.reshape(-1, h.shape[-1])[info.rows.index]
            masked = ((seen @ V) * (1 if info.mask is None else to_numpy(info.mask))) @ U + bias
            if info.delta_mask is not None:
                masked += to_numpy(info.delta_mask)[..., None] * (seen @ (W - V @ U))
            if info.rows is None:
                out = masked
            else:
                out.reshape(-1, out.shape[-1])[info.rows.index] = masked
        h = out
    return np.maximum(h, 0), inputs


def distance_numpy(kind, pred, target):
    if kind == "mse":
        return ((pred - target) ** 2).mean()
    log_p, log_t = log_softmax(pred, -1), log_softmax(target, -1)
    return (np.exp(log_t) * (log_t - log_p)).sum(-1).mean()


def mse_numpy(model, batch, masks):
    (wanted, _), (got, _) = (tms_numpy(model, batch.examples, m) for m in ({}, masks))
    return distance_numpy("mse", got, wanted)


@given(st.integers(1, 4), st.integers(2, 5))
def test_distances(n, d):
    pred, target = torch.randn(n, 3, d), torch.randn(n, 3, d)
    for kind, elements in (("mse", n * 3 * d), ("kl", n * 3)):
        sum_, count = distance(kind, pred, target)
        wanted = distance_numpy(kind, to_numpy(pred), to_numpy(target))
        assert count == elements and sum_.item() / count == pytest.approx(
            wanted, rel=1e-3, abs=1e-6
        )


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_distances_of_bf16_are_summed_in_float32(kind):
    pred, target = torch.randn(2, 400, 5).bfloat16()
    sum_, count = distance(kind, pred, target)
    assert sum_.dtype == torch.float32
    wanted = distance_numpy(kind, to_numpy(pred), to_numpy(target))
    assert sum_.item() / count == pytest.approx(wanted, rel=1e-4)


def test_faithfulness(tms_model):
    model = tms_model()
    sum_, count = faithfulness(model.components)
    errors = [
        (c.weight.double() - (c.V @ c.U).T.double()).square().sum().item()
        for c in model.components.values()
    ]
    assert count == 20 and sum_.item() == pytest.approx(sum(errors), rel=1e-5)


def with_pre_sigmoid(g, place=None, sigmoid="leaky_hard"):
    n = len(next(iter(g.values()))) if place is None else len(place)
    ci, x = {name: apply_sigmoid(v, sigmoid, None) for name, v in g.items()}, torch.zeros(n, 1)
    return Batch(x, x, {}, ci, StepRandomness(0, 0, 0, 1, n, CPU), {}, place)


def upper_of(g):
    g = g.double().numpy()
    return g.clip(0, 1) + 0.01 * (g - 1).clip(0)


@given(st.floats(0.3, 2.0), st.sampled_from([0.0, 0.5]), st.sampled_from([(5,), (2, 3)]))
def test_importance_minimality(p, beta, leading):
    g = {"a": torch.rand(*leading, 2) * 3 - 0.5, "b": torch.rand(*leading, 3).round()}
    sum_, count = importance_minimality(power_sums(with_pre_sigmoid(g), p), beta)
    n = np.prod(leading)
    wanted = 0.0
    for v in g.values():
        s = ((upper_of(v) + 1e-12) ** p).reshape(n, -1).mean(0)
        wanted += (s + beta * s * np.log2(1 + n * s)).sum()
    assert sum_.item() / count == pytest.approx(wanted, rel=1e-4)


def test_importance_minimality_of_another_sigmoid():
    g = 3 * torch.randn(20, 4)
    sum_, _ = importance_minimality(power_sums(with_pre_sigmoid({"a": g}, None, "normal"), 0.7), 0)
    wanted = (1 / (1 + np.exp(-g.double().numpy()))) ** 0.7
    assert sum_.item() == pytest.approx(wanted.mean(0).sum(), rel=1e-5)


@pytest.mark.parametrize("seq", [(), (3,)])
def test_examples_with_the_same_importances_are_counted_as_often_as_they_come(seq):
    g = {"a": torch.rand(3, *seq, 2), "b": torch.rand(3, *seq, 4)}
    place = torch.tensor([0, 2, 0, 0, 1, 2])
    sums = power_sums(with_pre_sigmoid(g, place), 0.7)
    wanted = [((v.double().numpy() + 1e-12) ** 0.7)[place].reshape(-1, v.shape[-1]).sum(0)
              for v in g.values()]  # fmt: skip
    np.testing.assert_allclose(sums, [*np.concatenate(wanted), 6 * np.prod(seq)], rtol=1e-5)


def test_importance_minimality_has_finite_gradients_at_zero():
    g = torch.zeros(4, 3, requires_grad=True)
    sums = power_sums(with_pre_sigmoid({"a": g}), 0.5)
    sum_, _ = importance_minimality(sums, 1.0)
    sum_.backward()
    assert g.grad.isfinite().all()


def test_minimality_follows_the_annealed_p(make_config, tms_model, one_process):
    model = tms_model()
    batch = make_batch(model, torch.rand(8, 5), lambda *s: torch.full(s, 0.5))
    overrides = [f"losses.importance_minimality.p_anneal_{k}" for k in
                 ("start_frac=0.0", "end_frac=0.0", "final_p=2.0")]  # fmt: skip
    got = loss("importance_minimality", make_config, model, batch, one_process, *overrides)
    assert got == pytest.approx(12 * 0.6**2, rel=1e-5)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_subset_where_all_or_nothing_is_routed(p, make_config, tms_model, one_process):
    model = tms_model()
    batch = make_batch(model, torch.rand(16, 5), torch.rand)
    name = "ci_masked_recon_subset"
    got = loss(name, make_config, model, batch, one_process, P_ALL.format(name, p))
    masks = {n: c.lower for n, c in batch.ci.items()}
    assert got == pytest.approx(mse_numpy(model, batch, masks) * p, rel=1e-4, abs=1e-12)


def test_uniform_k_subset_mixes_the_three_subsets(make_config, tms_model, one_process):
    model = tms_model()
    x = torch.rand(1, 5).expand(9600, 5)
    batch = make_batch(model, x, lambda n, C: torch.full((n, C), 0.6))
    name = "ci_masked_recon_subset"
    on = f"+losses.{name}={{coeff:1.0,routing:{{kind:uniform_k_subset}}}}"
    got = loss(name, make_config, model, batch, one_process, on)
    masks = {n: c.lower for n, c in batch.ci.items()}
    one, two = ({n: masks[n]} for n in masks)
    wanted = (mse_numpy(model, batch, one) + mse_numpy(model, batch, two)) / 4
    wanted += mse_numpy(model, batch, masks) / 2
    assert got == pytest.approx(wanted, rel=0.05)


def single_linear(make_config, exact, *overrides):
    """One linear module with one subcomponent, which is all of W (exact) or none of it."""
    off = ("~decompose.modules.linear2", "decompose.tied=[]", "decompose.modules.linear1=1")
    config = make_config(*off, *overrides).decompose
    target = nn.Sequential()
    target.add_module("linear1", nn.Linear(3, 2))
    target.linear1.weight.data = torch.outer(
        torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0, 3.0])
    )
    model = ComponentModel(target, config, 0)
    c = model.components["linear1"]
    c.V.data, c.U.data = torch.tensor([[1.0], [-1.0], [3.0]]), torch.tensor([[1.0, 2.0]])
    if not exact:
        c.V.data.zero_()
    return model


@pytest.mark.parametrize("name", ["stochastic_recon", "stochastic_recon_layerwise"])
@pytest.mark.parametrize("sampling, moment", [("continuous", 1 / 3), ("binomial", 1 / 2)])
def test_stochastic_recon_in_closed_form(name, sampling, moment, make_config, one_process):
    """out - target = -(1 - ci)(1 - r) W x, and (1 - r)^2 is 1/3 or 1/2 in the mean."""
    sampling = f"decompose.sampling={sampling}"
    model = single_linear(make_config, True, sampling, "decompose.n_mask_samples=4")
    x = torch.ones(4000, 3)
    batch = make_batch(model, x, lambda n, C: torch.full((n, C), 0.2))
    got = loss(name, make_config, model, batch, one_process)
    assert got == pytest.approx(0.8**2 * moment * (3**2 + 6**2) / 2, rel=0.03)


@pytest.mark.parametrize("sampling", ["continuous", "binomial"])
@pytest.mark.parametrize("delta, moment", [("true", 1 / 3), ("false", 1.0)])
def test_the_delta_is_uniform_or_absent(sampling, delta, moment, make_config, one_process):
    overrides = (f"decompose.sampling={sampling}", f"decompose.delta_component={delta}")
    model = single_linear(make_config, False, *overrides)
    batch = make_batch(model, torch.ones(9600, 3), torch.rand)
    got = loss("stochastic_recon", make_config, model, batch, one_process)
    assert got == pytest.approx(moment * (3**2 + 6**2) / 2, rel=0.03)


def test_mask_samples_differ_and_are_averaged(make_config, tms_model, one_process):
    values = []
    for n in (1, 2):
        model = tms_model(f"decompose.n_mask_samples={n}")
        batch = make_batch(model, torch.rand(16, 5), torch.zeros)
        config = make_config().losses.stochastic_recon
        sum_, count = parts("stochastic_recon", config, model, batch, one_process)
        assert count == n * 16 * 5
        values.append(sum_.item())
    assert values[0] < values[1] and values[1] != pytest.approx(2 * values[0], rel=1e-6)


def test_losses_that_are_off_are_not_configured(make_config):
    losses = make_config("losses.stochastic_recon=null", "+losses.faithfulness.coeff=2.0").losses
    names = ["importance_minimality", "faithfulness", "stochastic_recon_layerwise"]
    assert list(losses.configured()) == names


# ---------------------------------------------------------------- every reconstruction, in numpy

UNIFORM, STATIC = "{kind:uniform_k_subset}", "{kind:static_probability,p:0.4}"
PGD = "init:random,step_size:0.2,n_steps:2,scope:"
RECON = {
    "unmasked_recon": "",
    "ci_masked_recon": "",
    "ci_masked_recon_layerwise": "",
    "ci_masked_recon_subset": ",routing:",
    "stochastic_recon": "",
    "stochastic_recon_layerwise": "",
    "stochastic_recon_subset": ",routing:",
    "pgd_recon": f",{PGD}shared_across_batch",
    "pgd_recon_layerwise": f",{PGD}unique_per_datapoint",
    "pgd_recon_subset": f",{PGD}unique_per_datapoint,routing:",
}
POSITIONS = pytest.mark.parametrize("positions", [(), (3,)], ids=["batch", "batch_seq"])
EVERY_RECON = pytest.mark.parametrize("name", RECON)


def switched_on(name, options, routing):
    options += routing if options.endswith("routing:") else ""
    return f"++losses.{name}={{coeff:1.0{options}}}"


@pytest.fixture
def passes(monkeypatch):
    """The masks of every forward pass through components, in their order."""
    seen, run = [], ComponentModel.run_masked

    def spy(self, x, masks, *rest, **named):
        seen.append(written_down(masks))
        return run(self, x, masks, *rest, **named)

    monkeypatch.setattr(ComponentModel, "run_masked", spy)
    return seen


@pytest.fixture
def recon_parts(make_config, tms_model, one_process):
    """A model, a batch and (sum, count) of one loss; lower importances are leaves of the graph."""

    def run(name, positions, *overrides, routing=UNIFORM, **decompose):
        model = tms_model("decompose.n_mask_samples=2")
        model.config = model.config.model_copy(update=decompose)
        batch = make_batch(model, 3 * torch.rand(4, *positions, 5), torch.rand)
        for ci in batch.ci.values():
            ci.lower.requires_grad_()
        every = [switched_on(n, options, routing) for n, options in RECON.items()]
        config = make_config(*every, *overrides).losses.configured()[name]
        return model, batch, parts(name, config, model, batch, one_process)

    return run


def final_passes(name, passes):
    """Those that the loss is made of; a search comes before them."""
    n = 2 if name.endswith("_layerwise") else 1
    n *= 2 if name.startswith("stochastic") else 1
    assert len(passes) == n * (3 if name.startswith("pgd") else 1)
    return passes[-n:]


@POSITIONS
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("distance", ["mse", "kl"])
@EVERY_RECON
def test_recon_is_the_mean_distance_of_its_passes(
    name, distance, delta, positions, recon_parts, passes
):
    model, batch, (sum_, count) = recon_parts(
        name, positions, distance=distance, delta_component=delta
    )
    wanted, _ = tms_numpy(model, batch.examples, {})
    each = [
        distance_numpy(distance, tms_numpy(model, batch.examples, masks)[0], wanted)
        for masks in final_passes(name, passes)
    ]
    assert sum_.item() / count == pytest.approx(np.mean(each), rel=1e-4, abs=1e-6)


@POSITIONS
@pytest.mark.parametrize("routing", [UNIFORM, STATIC], ids=["uniform_k", "static"])
@EVERY_RECON
def test_which_masks_a_loss_uses(name, routing, positions, recon_parts, passes):
    _, batch, _ = recon_parts(name, positions, routing=routing)
    for masks in passes:
        assert len(masks) == (1 if name.endswith("_layerwise") else 2)
        for module, info in masks.items():
            lower = batch.ci[module].lower
            if info.rows is not None:
                lower = lower.flatten(0, -2)[info.rows.index]
            if name == "unmasked_recon":
                assert info.mask is None
            elif name.startswith("ci"):
                assert torch.equal(info.mask, lower)
            else:
                assert (info.mask >= lower).all() and (info.mask <= 1).all()
                assert (info.mask > lower).any() or not len(lower)
            assert (info.delta_mask is not None) == name.startswith(("stochastic", "pgd"))
            assert (info.rows is not None) == name.endswith("_subset")


@EVERY_RECON
def test_layerwise_masks_every_module_in_turn(name, recon_parts, passes):
    recon_parts(name, ())
    modules = [list(masks) for masks in final_passes(name, passes)]
    turns = [["linear1"], ["linear2"]] if name.endswith("_layerwise") else [["linear1", "linear2"]]
    assert modules == turns * (2 if name.startswith("stochastic") else 1)


def test_no_two_stochastic_passes_share_numbers(recon_parts, passes):
    for name in ("stochastic_recon", "stochastic_recon_layerwise", "stochastic_recon_subset"):
        recon_parts(name, (3,))
    infos = [info for masks in passes for info in masks.values()]
    drawn = torch.cat([i.delta_mask.flatten()[: i.rows.n if i.rows else None] for i in infos])
    assert len(drawn) > 100 and len(drawn.unique()) == len(drawn)
    first, second = ([i.rows.index.tolist() for i in masks.values()] for masks in passes[-2:])
    assert first != second


def moved(model, masks, directions, ci, t):
    """The model and the masks after a step of size t; the sources of the masks stay."""
    model = copy.deepcopy(model)
    for name, c in model.components.items():
        c.V.data += t * directions[name, "V"]
        c.U.data += t * directions[name, "U"]
    result = {}
    for name, info in masks.items():
        mask = info.mask
        if mask is not None:
            lower = at_rows(ci[name].lower.double(), info.rows, ci[name].lower.dim() - 1)
            r = (mask - lower) / (1 - lower)
            along = directions[name, "lower"]
            lower = lower + t * at_rows(along, info.rows, along.dim() - 1)
            mask = lower + (1 - lower) * r
        result[name] = MaskInfo(mask, info.delta_mask, info.rows)
    return model, result


@pytest.mark.parametrize("distance", ["mse", "kl"])
@EVERY_RECON
def test_gradients_against_finite_differences_in_numpy(name, distance, recon_parts, passes):
    """Of V, U and the importances, along a random direction; adversarial sources are constants."""
    model, batch, (sum_, count) = recon_parts(name, (3,), distance=distance)
    (sum_ / count).backward()
    tensors = {
        (n, key): tensor
        for n, c in model.components.items()
        for key, tensor in (("V", c.V), ("U", c.U), ("lower", batch.ci[n].lower))
    }
    directions = {k: torch.randn(t.shape, dtype=torch.float64) for k, t in tensors.items()}
    wanted, _ = tms_numpy(model, batch.examples, {})

    def value(t):
        each = []
        for masks in final_passes(name, passes):
            shifted, masks = moved(model.double(), masks, directions, batch.ci, t)
            each.append(
                distance_numpy(distance, tms_numpy(shifted, batch.examples, masks)[0], wanted)
            )
        return np.mean(each)

    got = sum(
        (directions[k] * t.grad).sum().item() for k, t in tensors.items() if t.grad is not None
    )
    assert got == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-3)


# ---------------------------------------------------------------- hidden activations, minimality


@POSITIONS
def test_hidden_acts_recon(positions, recon_parts, passes):
    name = "stochastic_hidden_acts_recon"
    model, batch, (sum_, count) = recon_parts(name, positions, f"+losses.{name}.coeff=1.0")
    _, wanted = tms_numpy(model, batch.examples, {})
    assert len(passes) == 2 and all(set(masks) == set(wanted) for masks in passes)
    errors = [
        (tms_numpy(model, batch.examples, masks)[1][n] - wanted[n]) ** 2
        for masks in passes
        for n in wanted
    ]
    assert count == sum(e.size for e in errors)
    assert sum_.item() == pytest.approx(sum(e.sum() for e in errors), rel=1e-4)


def token_model(make_config, *overrides):
    """An embedding of 7 tokens and a linear map."""
    modules = ("~decompose.modules.linear1", "~decompose.modules.linear2", "decompose.tied=[]")
    config = make_config(*modules, "+decompose.modules={embed:3}", *overrides).decompose
    target = nn.Sequential()
    target.add_module("embed", nn.Embedding(7, 4))
    target.add_module("head", nn.Linear(4, 2))
    return ComponentModel(target, config, 0)


def test_hidden_acts_recon_leaves_tokens_out(make_config, one_process, passes):
    model = token_model(make_config, "+decompose.modules.head=3")
    batch = make_batch(model, torch.randint(7, (4, 3)), torch.rand)
    name = "stochastic_hidden_acts_recon"
    got = loss(name, make_config, model, batch, one_process, f"+losses.{name}.coeff=1.0")
    (masks,) = passes
    c, info = model.components["embed"], masks["embed"]
    W, V, U, m, m_d = map(to_numpy, (c.weight.T, c.V, c.U, info.mask, info.delta_mask[..., None]))
    tokens = batch.examples.numpy()
    masked = (V[tokens] * m) @ U + m_d * (W - V @ U)[tokens]
    assert got == pytest.approx(((masked - W[tokens]) ** 2).mean(), rel=1e-4)


def test_hidden_acts_recon_of_embeddings_alone_is_refused(make_config, one_process):
    model = token_model(make_config)
    batch = make_batch(model, torch.randint(7, (4, 3)), torch.rand)
    name = "stochastic_hidden_acts_recon"
    with pytest.raises(ValueError, match=r"hidden_acts.*embeddings"):
        loss(name, make_config, model, batch, one_process, f"+losses.{name}.coeff=1.0")


@pytest.mark.parametrize("position, p", [(0.0, 2.0), (0.4, 1.5), (0.9, 1.0)])
@POSITIONS
def test_minimality_at_a_position_of_training(
    positions, position, p, make_config, tms_model, one_process
):
    """p moves from 2 to 1 between 0.2 and 0.6."""
    anneal = "p:2.0,p_anneal_start_frac:0.2,p_anneal_end_frac:0.6,p_anneal_final_p:1.0"
    overrides = f"losses.importance_minimality={{coeff:1.0,beta:0.5,{anneal}}}"
    name, model = "importance_minimality", tms_model()
    batch = make_batch(model, torch.rand(4, *positions, 5), torch.rand)
    config = make_config(overrides).losses.importance_minimality
    sum_, count = parts(name, config, model, batch, one_process, position)
    wanted, n = 0.0, 4 * np.prod(positions)
    for ci in batch.ci.values():
        s = (to_numpy(ci.upper) ** p).reshape(-1, 6).mean(0)
        wanted += (s + 0.5 * s * np.log2(1 + n * s)).sum()
    assert sum_.item() / count == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("experiment", ["tms_5-2", "resid_mlp1"])
@pytest.mark.parametrize("name, options", [
    ("unmasked_recon", LossConfig()),
    ("ci_masked_recon_layerwise", LossConfig()),
    ("stochastic_recon", LossConfig()),
    ("stochastic_recon_subset", SubsetReconConfig(routing=SUBSET)),
    ("pgd_recon", SHARED_PGD),
    ("stochastic_hidden_acts_recon", LossConfig()),
])  # fmt: skip
def test_examples_without_input_add_nothing(name, options, experiment, one_process):
    """The loss looks at the others alone, and has the value and gradient of all examples."""
    arguments = [f"+experiment={experiment}", "cluster=local", "train.batch_size=200"]
    config = validate(compose(arguments, multirun=False)[0].values)
    target = untrained_target(config, None, torch.Generator().manual_seed(0))
    model = ComponentModel(target, config.decompose, 0)
    (batch,) = training_batches(Decomposition(config, model, one_process, None), 0)[0]()
    assert 0 < len(batch.active.examples) < len(batch.examples) == 200
    plain = dataclasses.replace(batch, active=None, own_acts={})

    def loss_and_gradient(sum_, count):
        trained = list(model.trained_parameters().values())
        gradient = torch.autograd.grad(sum_ / count, trained, retain_graph=True, allow_unused=True)
        return [sum_ / count, *(g for g in gradient if g is not None)]

    fast = loss_and_gradient(*parts(name, options, model, batch, one_process))
    slow = loss_and_gradient(*parts(name, options, model, plain, one_process))
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-7)
