"""Adversarial sources, where the worst ones are known: parallel modules of one input and output.

With x in, t_c = V_c U_c and w the weight, a masked module is wrong by
E = x (sum_c m_c t_c + m_d (w - sum_c t_c) - w), m_c = ci_c + (1 - ci_c) s_c and m_d = s_d.
"""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from spd_core.ci_fns import CausalImportance
from spd_core.component_model import ComponentModel
from spd_core.data.batches import Batch, Decomposition
from spd_core.distributed import Dist
from spd_core.evaluate import due_metrics, evaluate
from spd_core.losses import loss_parts, pgd, prepare_step
from spd_core.randomness import StepRandomness

CPU = torch.device("cpu")
CI = 0.1
# E is positive in "a" and negative in "b" wherever the sources are (without the delta).
T = {"a": np.array([2.0, 1.0, -0.5]), "b": np.array([-1.5, 0.25, 1.0])}
W = {"a": -1.0, "b": 4.0}
NAMES = ("pgd_recon", "pgd_recon_subset", "pgd_recon_layerwise")
EVERY_FORM = pytest.mark.parametrize("name", NAMES)
EVERY_INIT = pytest.mark.parametrize("init", ["random", "ones", "zeroes"])
UNIQUE, SHARED = "unique_per_datapoint", "shared_across_batch"
BOTH_SCOPES = pytest.mark.parametrize("scope", [UNIQUE, SHARED])


class Parallel(nn.Module):
    """Linear maps of one number, side by side; `idle` runs, but nothing comes of it."""

    def __init__(self, names, idle=()):
        super().__init__()
        self.names, self.unheard = names, idle
        for name in (*names, *idle):
            self.add_module(name, nn.Linear(1, 1, bias=False))
            self.get_submodule(name).weight.data.fill_(W.get(name, 1.0))

    def forward(self, x):
        for name in self.unheard:
            self.get_submodule(name)(x)
        return torch.cat([self.get_submodule(name)(x) for name in self.names], -1)


def parallel(make_config, delta, target=None):
    target = Parallel(list(T)) if target is None else target
    update = {"modules": {"*": 3}, "tied": [], "delta_component": delta}
    model = ComponentModel(target, make_config().decompose.model_copy(update=update), 0)
    for name, t in T.items():
        if name in model.components:
            c = model.components[name]
            c.V.data, c.U.data = torch.ones(1, 3), torch.tensor(t[:, None], dtype=torch.float32)
    return model


def batch_of(model, x, ci=CI, part=0, n_parts=1):
    lower = {n: torch.full((*x.shape[:-1], 3), ci).requires_grad_() for n in model.components}
    target_out, inputs = model.run_target(x)
    importances = {n: CausalImportance(v, v, "leaky_hard") for n, v in lower.items()}
    randomness = StepRandomness(0, 0, part, n_parts, len(x) * n_parts, CPU)
    return Batch(x, target_out, inputs, importances, randomness, {})


def loss_config(make_config, name, routing="{kind:static_probability,p:1.0}", **options):
    on = "coeff:1.0"
    if name.startswith("pgd"):
        on += f",init:random,step_size:0.1,n_steps:20,scope:{UNIQUE}"
    if name.endswith("_subset"):
        on += f",routing:{routing}"
    losses = make_config(f"++losses.{name}={{{on}}}").losses.configured()
    return losses[name].model_copy(update=options)


@pytest.fixture
def adversary(make_config, one_process):
    """(sources of every module, loss) of one form of PGD; `batches` cut the batch of the loss."""

    def run(
        name, scope, init, model, batch, *, step_size=0.3, n_steps=8, batches=None, dist=one_process
    ):
        config = loss_config(
            make_config, name, scope=scope, init=init, step_size=step_size, n_steps=n_steps
        )
        found = []
        with pytest.MonkeyPatch.context() as patch:
            search = pgd.worst_sources
            patch.setattr(
                pgd, "worst_sources", lambda *a, **k: found.append(search(*a, **k)) or found[0]
            )
            all_batches = [batch] if batches is None else batches
            step = prepare_step(
                Decomposition(None, model, dist, None), {name: config}, lambda: all_batches, 1, {}
            )
            sum_, count = loss_parts(name, config, batch, step)
        return found[0], sum_ / count

    return run


def error(name, sources, delta, ci=CI):
    """E / x, for sources (..., C or C + 1)."""
    s, t = np.asarray(sources, dtype=float), T[name]
    e = ((ci + (1 - ci) * s[..., :3]) * t).sum(-1) - W[name]
    return e + s[..., 3] * (W[name] - t.sum()) if delta else e


def worst_corner(name, delta):
    corners = np.array(list(product([0.0, 1.0], repeat=3 + delta)))
    return corners[(error(name, corners, delta) ** 2).argmax()]


def mean_of_squares(name, errors, x):
    """The loss from E / x of "a" and "b"; layerwise, only one of the two is wrong at a time."""
    squares = sum(np.mean(x.numpy()[..., 0] ** 2 * errors[n] ** 2) for n in errors) / 2
    return squares / 2 if name.endswith("_layerwise") else squares


# ---------------------------------------------------------------- the worst mask


@pytest.mark.parametrize("shape", [(4, 1), (4, 3, 1)], ids=["batch", "batch_seq"])
@EVERY_INIT
@BOTH_SCOPES
@EVERY_FORM
def test_the_worst_of_all_corners_is_found(name, scope, init, shape, make_config, adversary):
    model, x = parallel(make_config, False), torch.randn(shape)
    sources, loss = adversary(name, scope, init, model, batch_of(model, x))
    worst = {n: worst_corner(n, False) for n in T}
    leading = shape[:-1] if scope == UNIQUE else (1,) * (len(shape) - 1)
    for n, corner in worst.items():
        wanted = np.broadcast_to(corner, (*leading, 3))
        np.testing.assert_array_equal(sources[n].numpy(), wanted)
    errors = {n: error(n, corner, False) for n, corner in worst.items()}
    assert loss.item() == pytest.approx(mean_of_squares(name, errors, x), rel=1e-5)


@BOTH_SCOPES
def test_the_delta_is_attacked_too(scope, make_config, adversary):
    model, x = parallel(make_config, True), torch.randn(4, 3, 1)
    sources, loss = adversary("pgd_recon", scope, "zeroes", model, batch_of(model, x))
    worst = {n: worst_corner(n, True) for n in T}
    assert {n: corner[3] for n, corner in worst.items()} == {"a": 0.0, "b": 0.0}
    for n, corner in worst.items():
        leading = (4, 3) if scope == UNIQUE else (1, 1)
        np.testing.assert_array_equal(sources[n].numpy(), np.broadcast_to(corner, (*leading, 4)))
    errors = {n: error(n, corner, True) for n, corner in worst.items()}
    assert loss.item() == pytest.approx(mean_of_squares("pgd_recon", errors, x), rel=1e-5)


@BOTH_SCOPES
def test_nothing_is_wrong_and_no_gradient_known_where_all_is_one(scope, make_config, adversary):
    model = parallel(make_config, True)
    batch = batch_of(model, torch.ones(4, 1))
    sources, loss = adversary("pgd_recon", scope, "ones", model, batch)
    assert loss.item() == 0 and all((s == 1).all() for s in sources.values())


def ascend_numpy(starts, x, ci, delta, step_size, n_steps):
    """Projected sign ascent on the sum of E^2; dE/ds_c = x (1 - ci) t_c, dE/ds_d = x (w - t)."""
    result = {}
    for name, s in starts.items():
        slope = (1 - ci) * T[name]
        if delta:
            slope = np.append(slope, W[name] - T[name].sum())
        for _ in range(n_steps):
            gradient = (2 * error(name, s, delta, ci) * x**2)[..., None] * slope
            axes = tuple(i for i, n in enumerate(s.shape) if n == 1)
            gradient = gradient.sum(axes, keepdims=True) if axes else gradient
            s = np.clip(s + step_size * np.sign(gradient), 0, 1)
        result[name] = s
    return result


@pytest.mark.parametrize("n_steps", [1, 2, 9])
@pytest.mark.parametrize("delta", [True, False])
@BOTH_SCOPES
@EVERY_FORM
def test_the_ascent_step_by_step(name, scope, delta, n_steps, make_config, adversary):
    model, x = parallel(make_config, delta), torch.randn(6, 2, 1)
    batch = batch_of(model, x, ci=0.3)
    start, _ = adversary(name, scope, "random", model, batch, n_steps=0)
    got, loss = adversary(name, scope, "random", model, batch, step_size=0.13, n_steps=n_steps)
    starts = {n: s.double().numpy() for n, s in start.items()}
    wanted = ascend_numpy(starts, x.double().numpy()[..., 0], 0.3, delta, 0.13, n_steps)
    for n, source in got.items():
        np.testing.assert_allclose(source.numpy(), wanted[n], atol=1e-5)
    errors = {n: error(n, s, delta, 0.3) for n, s in wanted.items()}
    assert loss.item() == pytest.approx(mean_of_squares(name, errors, x), rel=1e-4)


def test_many_batches_are_searched_as_one(make_config, adversary):
    model, x = parallel(make_config, True), torch.randn(6, 1)
    cut = [batch_of(model, part, part=i, n_parts=3) for i, part in enumerate(x.split(2))]
    search = partial(adversary, "pgd_recon", SHARED, "random", model, batch_of(model, x))
    whole, loss = search()
    parts, loss_of_parts = search(batches=cut)
    assert all(torch.equal(whole[n], parts[n]) for n in whole) and torch.equal(loss, loss_of_parts)


@EVERY_FORM
def test_the_worst_loss_is_above_the_stochastic_one(name, make_config, tms_model, one_process):
    model = tms_model()
    x = torch.rand(16, 5)
    target_out, inputs = model.run_target(x)
    ci, _ = model.causal_importances(inputs, None, "off")
    batch = Batch(x, target_out, inputs, ci, StepRandomness(0, 0, 0, 1, 16, CPU), {})
    stochastic = name.replace("pgd", "stochastic")
    losses = {n: loss_config(make_config, n, "{kind:uniform_k_subset}") for n in (name, stochastic)}
    step = prepare_step(
        Decomposition(None, model, one_process, None), losses, lambda: [batch], 1, {}
    )
    parts = {n: loss_parts(n, config, batch, step) for n, config in losses.items()}
    values = {n: sum_ / count for n, (sum_, count) in parts.items()}
    assert values[name] > 1.5 * values[stochastic]


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("delta", [True, False])
@BOTH_SCOPES
@EVERY_INIT
def test_no_steps_are_the_initial_sources(init, scope, delta, make_config, adversary):
    model, x = parallel(make_config, delta), torch.randn(50, 3, 1)
    sources, loss = adversary("pgd_recon", scope, init, model, batch_of(model, x), n_steps=0)
    leading = (50, 3) if scope == UNIQUE else (1, 1)
    for source in sources.values():
        assert source.shape == (*leading, 3 + delta)
        match init:
            case "random":
                assert (source >= 0).all() and (source < 1).all()
                assert len(source.unique()) == source.numel()
            case "ones":
                assert (source == 1).all()
            case "zeroes":
                assert (source == 0).all()
    errors = {n: error(n, s.numpy(), delta) for n, s in sources.items()}
    assert loss.item() == pytest.approx(mean_of_squares("pgd_recon", errors, x), rel=1e-4, abs=1e-9)


def test_modules_and_datapoints_start_from_their_own_random_numbers(make_config, adversary):
    model, x = parallel(make_config, True), torch.randn(20, 3, 1)
    sources, _ = adversary("pgd_recon", UNIQUE, "random", model, batch_of(model, x), n_steps=0)
    values = torch.cat([s.flatten() for s in sources.values()])
    assert len(values) == 2 * 60 * 4 and len(values.unique()) >= len(values) - 1
    assert abs(values.mean().item() - 0.5) < 0.05


@pytest.mark.parametrize("n_steps", [1, 2, 3, 4])
@pytest.mark.parametrize("init, start", [("zeroes", 0.0), ("ones", 1.0)])
@BOTH_SCOPES
def test_steps_add_up_and_end_at_zero_and_one(scope, init, start, n_steps, make_config, adversary):
    model = parallel(make_config, False)
    batch = batch_of(model, torch.randn(4, 1))
    sources, _ = adversary("pgd_recon", scope, init, model, batch, n_steps=n_steps)
    for name, source in sources.items():
        direction = 2 * worst_corner(name, False) - 1
        wanted = np.clip(start + 0.3 * n_steps * direction, 0, 1)
        np.testing.assert_allclose(source.numpy(), np.broadcast_to(wanted, source.shape), atol=1e-6)


class Twins:
    """Stands for over_ranks of two ranks that hold the same batch, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, op, parts, _dist):
        assert op == "sum"
        self.calls += 1
        return {name: 2 * part for name, part in parts.items()}


@pytest.mark.parametrize("scope, calls", [(UNIQUE, 0), (SHARED, 5)])
@EVERY_FORM
def test_shared_sources_cost_one_collective_per_step_and_unique_ones_none(
    name, scope, calls, make_config, adversary, monkeypatch
):
    over_ranks = Twins()
    monkeypatch.setattr(pgd, "over_ranks", over_ranks)
    model = parallel(make_config, True)
    two = Dist(rank=1, world_size=2, device=CPU)
    batch = batch_of(model, torch.randn(4, 1))
    adversary(name, scope, "random", model, batch, n_steps=5, dist=two)
    assert over_ranks.calls == calls


@pytest.mark.parametrize("routing", ["uniform_k_subset", "static_probability,p:0.5"])
@BOTH_SCOPES
def test_routes_are_drawn_once(scope, routing, make_config, one_process, monkeypatch):
    model, seen, run = parallel(make_config, True), [], ComponentModel.run_masked

    def spy(self, x, masks, **named):
        seen.append([info.rows.index.tolist() for info in masks.values()])
        return run(self, x, masks, **named)

    monkeypatch.setattr(ComponentModel, "run_masked", spy)
    batch = batch_of(model, torch.randn(40, 3, 1))
    name, options = "pgd_recon_subset", {"scope": scope, "n_steps": 3}
    config = loss_config(make_config, name, f"{{kind:{routing}}}", **options)
    step = prepare_step(
        Decomposition(None, model, one_process, None), {name: config}, lambda: [batch], 1, {}
    )
    loss_parts(name, config, batch, step)
    assert len(seen) == 4 and all(routes == seen[0] for routes in seen)
    assert all(0 < len(set(rows)) < 120 for rows in seen[0])


# ---------------------------------------------------------------- gradients


@BOTH_SCOPES
@EVERY_FORM
def test_the_search_leaves_gradients_alone(name, scope, make_config, adversary):
    model = parallel(make_config, True)
    for parameter in model.trained_parameters().values():
        parameter.grad = torch.full_like(parameter, 7.0)
    batch = batch_of(model, torch.randn(4, 1))
    sources, loss = adversary(name, scope, "random", model, batch)
    assert all((p.grad == 7).all() for p in model.trained_parameters().values())
    assert all(ci.lower.grad is None for ci in batch.ci.values())
    assert loss.requires_grad and not any(s.requires_grad for s in sources.values())


@BOTH_SCOPES
def test_only_sources_have_gradients_in_the_search(scope, make_config, adversary):
    model, learn = parallel(make_config, True), []
    batch, U = batch_of(model, torch.randn(4, 1)), model.components["a"].U
    model.target.get_submodule("a").register_forward_hook(lambda *_: learn.append(U.requires_grad))
    _, loss = adversary("pgd_recon", scope, "random", model, batch, n_steps=2)
    assert learn == [False, False, True]
    loss.backward()
    assert U.grad.any()


@BOTH_SCOPES
@EVERY_FORM
def test_importances_get_the_gradient_of_the_final_pass(name, scope, make_config, adversary):
    """d E^2 / d ci_c = 2 E x (1 - s_c) t_c, the sources taken as constants."""
    model, x = parallel(make_config, False), torch.randn(4, 3, 1)
    batch = batch_of(model, x)
    sources, loss = adversary(name, scope, "random", model, batch, n_steps=1)
    loss.backward()
    for n, ci in batch.ci.items():
        s = np.broadcast_to(sources[n].numpy(), (4, 3, 3))
        e = error(n, s, False)[..., None] * x.numpy()
        wanted = 2 * e * x.numpy() * (1 - s) * T[n] / (2 * 12)
        wanted /= 2 if name.endswith("_layerwise") else 1
        np.testing.assert_allclose(ci.lower.grad.numpy(), wanted, rtol=1e-4, atol=1e-6)


@BOTH_SCOPES
@EVERY_FORM
def test_the_search_is_the_same_under_no_grad(name, scope, make_config, adversary):
    model = parallel(make_config, True)
    search = partial(adversary, name, scope, "random", model, batch_of(model, torch.randn(4, 3, 1)))
    sources, loss = search()
    with torch.no_grad():
        others, other = search()
        assert not torch.is_grad_enabled()
    assert all(torch.equal(sources[n], others[n]) for n in sources)
    assert torch.equal(loss.detach(), other) and not other.requires_grad


def test_every_form_is_a_metric(make_config, tms_model, one_process, tmp_path):
    search = f"when:fast,init:random,step_size:0.1,n_steps:2,scope:{SHARED}"
    config = make_config(
        f"+eval.metrics.pgd_recon={{{search}}}",
        f"+eval.metrics.pgd_recon_layerwise={{{search}}}",
        f"+eval.metrics.pgd_recon_subset={{{search},routing:{{kind:uniform_k_subset}}}}",
    )
    due = due_metrics(config, 3)
    values = evaluate(
        Decomposition(config, tms_model(), one_process, None), 3, due, None, 1.0, tmp_path
    )
    assert all(values[f"eval/{name}"] > 0 for name in NAMES)


@pytest.mark.parametrize("used", [("a", "b"), ()], ids=["among_others", "alone"])
@BOTH_SCOPES
@EVERY_FORM
def test_a_module_that_nothing_comes_of_is_refused_by_name(
    name, scope, used, make_config, adversary
):
    target = Parallel(["a", "b"], idle=["idle"])
    model = parallel(make_config, True, target)
    if not used:
        update = model.config.model_copy(update={"modules": {"idle": 3}})
        model = ComponentModel(target, update, 0)
    batch = batch_of(model, torch.randn(4, 1))
    with pytest.raises(ValueError, match=f"(?s)does not depend on idle, .*{name}"):
        adversary(name, scope, "random", model, batch)


class Pooled(nn.Module):
    """`each` runs at the positions of a sequence, `pooler` once for an example."""

    def __init__(self):
        super().__init__()
        self.each, self.pooler = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, x):
        return self.pooler(self.each(x).mean(1))


@pytest.mark.parametrize("n", [2, 4])
@BOTH_SCOPES
def test_modules_have_sources_at_their_own_positions(n, scope, make_config, one_process):
    model, x = parallel(make_config, True, Pooled()), torch.rand(n, 4, 1)
    target_out, inputs = model.run_target(x)
    lower = {name: torch.rand(*of.shape[:-1], 3) for name, of in inputs.items()}
    ci = {name: CausalImportance(v, v, "leaky_hard") for name, v in lower.items()}
    batch = Batch(x, target_out, inputs, ci, StepRandomness(0, 0, 0, 1, n, CPU), {})
    search = loss_config(make_config, "pgd_recon", scope=scope)
    shared_by = one_process if scope == SHARED else None
    sources = pgd.worst_sources(model, lambda: [batch], search, "all", "pgd_recon", shared_by)
    shapes = {"each": (n, 4, 4), "pooler": (n, 4)}
    if scope == SHARED:
        shapes = {"each": (1, 1, 4), "pooler": (1, 4)}
    assert {name: tuple(source.shape) for name, source in sources.items()} == shapes
