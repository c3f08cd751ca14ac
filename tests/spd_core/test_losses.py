import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import nn

from spd_core.ci_fns import CausalImportance
from spd_core.component_model import ComponentModel
from spd_core.losses import Batch, configured, loss_parts
from spd_core.losses.distance import distance
from spd_core.losses.faithfulness import faithfulness
from spd_core.losses.minimality import importance_minimality
from spd_core.randomness import StepRandomness

CPU = torch.device("cpu")
P_ALL = "+losses.{}={{coeff:1.0,routing:{{kind:static_probability,p:{}}}}}"


def importances(lower):
    return CausalImportance(lower, lower, lower)


def make_batch(model, x, lower):
    ci = {n: importances(lower(len(x), c.C)) for n, c in model.components.items()}
    target_out, _ = model.run_target(x)
    return Batch(x, target_out, ci, StepRandomness(0, 0, 0, 1, len(x), CPU))


def loss(name, make_config, model, batch, dist, *overrides):
    config = configured(make_config(*overrides).losses)[name]
    sum_, count = loss_parts(name, config, model, batch, 0, 6, dist)
    return sum_.item() / count


def tms_numpy(model, x, masks):
    """The TMS with the modules of `masks` on their components and no delta."""
    h = x.double().numpy()
    for name in ("linear1", "linear2"):
        c, linear = model.components[name], model.target.get_submodule(name)
        W = linear.weight.double().numpy().T
        if name in masks:
            V, U = c.V.detach().double().numpy(), c.U.detach().double().numpy()
            h = ((h @ V) * masks[name].double().numpy()) @ U
        else:
            h = h @ W
        h = h if linear.bias is None else h + linear.bias.double().numpy()
    return np.maximum(h, 0)


def mse_numpy(model, batch, masks):
    wanted = tms_numpy(model, batch.examples, {})
    return ((tms_numpy(model, batch.examples, masks) - wanted) ** 2).mean()


@given(st.integers(1, 4), st.integers(2, 5))
def test_distances(n, d):
    pred, target = torch.randn(n, 3, d), torch.randn(n, 3, d)
    p, t = pred.double().numpy(), target.double().numpy()
    sum_, count = distance("mse", pred, target)
    assert (sum_.item(), count) == (pytest.approx(((p - t) ** 2).sum(), rel=1e-4), n * 3 * d)
    sum_, count = distance("kl", pred, target)
    log_p, log_t = log_softmax(p, -1), log_softmax(t, -1)
    kl = (np.exp(log_t) * (log_t - log_p)).sum()
    assert (sum_.item(), count) == (pytest.approx(kl, rel=1e-3, abs=1e-5), n * 3)


def test_faithfulness(tms_model):
    model = tms_model()
    sum_, count = faithfulness(model.components)
    errors = [
        (c.weight.double() - (c.V @ c.U).T.double()).square().sum().item()
        for c in model.components.values()
    ]
    assert count == 20 and sum_.item() == pytest.approx(sum(errors), rel=1e-5)


@given(st.floats(0.3, 2.0), st.sampled_from([0.0, 0.5]), st.sampled_from([(5,), (2, 3)]))
def test_importance_minimality(p, beta, leading):
    from spd_core.distributed import Dist

    upper = {"a": torch.rand(*leading, 2) * 1.2, "b": torch.rand(*leading, 3).round()}
    ci = {n: CausalImportance(u.new_zeros(u.shape), u, u) for n, u in upper.items()}
    sum_, count = importance_minimality(ci, p, beta, Dist(0, 1, CPU))
    n = np.prod(leading)
    wanted = 0.0
    for u in upper.values():
        s = ((u.double().numpy() + 1e-12) ** p).reshape(n, -1).mean(0)
        wanted += (s + beta * s * np.log2(1 + n * s)).sum()
    assert sum_.item() / count == pytest.approx(wanted, rel=1e-4)


def test_importance_minimality_has_finite_gradients_at_zero(one_process):
    upper = torch.zeros(4, 3, requires_grad=True)
    sum_, _ = importance_minimality(
        {"a": CausalImportance(upper, upper, upper)}, 0.5, 1.0, one_process
    )
    sum_.backward()
    assert upper.grad.isfinite().all()


def test_minimality_follows_the_annealed_p(make_config, tms_model, one_process):
    model = tms_model()
    batch = make_batch(model, torch.rand(8, 5), lambda *s: torch.full(s, 0.5))
    overrides = [f"losses.importance_minimality.p_anneal_{k}" for k in
                 ("start_frac=0.0", "end_frac=0.0", "final_p=2.0")]  # fmt: skip
    got = loss("importance_minimality", make_config, model, batch, one_process, *overrides)
    assert got == pytest.approx(12 * 0.25, rel=1e-5)


@pytest.mark.parametrize("name", ["unmasked_recon", "ci_masked_recon"])
def test_recon(name, make_config, tms_model, one_process):
    model = tms_model()
    batch = make_batch(model, torch.rand(16, 5), torch.rand)
    masks = {n: torch.ones_like(c.lower) if name == "unmasked_recon" else c.lower
             for n, c in batch.ci.items()}  # fmt: skip
    got = loss(name, make_config, model, batch, one_process, f"+losses.{name}.coeff=1.0")
    assert got == pytest.approx(mse_numpy(model, batch, masks), rel=1e-4)


def test_layerwise_is_the_mean_over_modules(make_config, tms_model, one_process):
    model = tms_model()
    batch = make_batch(model, torch.rand(16, 5), torch.rand)
    name = "ci_masked_recon_layerwise"
    got = loss(name, make_config, model, batch, one_process, f"+losses.{name}.coeff=1.0")
    each = [mse_numpy(model, batch, {n: c.lower}) for n, c in batch.ci.items()]
    assert got == pytest.approx(np.mean(each), rel=1e-4)


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
        sum_, count = loss_parts("stochastic_recon", config, model, batch, 0, 6, one_process)
        assert count == n * 16 * 5
        values.append(sum_.item())
    assert values[0] < values[1] and values[1] != pytest.approx(2 * values[0], rel=1e-6)


def test_losses_that_are_off_are_not_configured(make_config):
    losses = make_config("losses.stochastic_recon=null", "+losses.faithfulness.coeff=2.0").losses
    names = ["importance_minimality", "faithfulness", "stochastic_recon_layerwise"]
    assert list(configured(losses)) == names
