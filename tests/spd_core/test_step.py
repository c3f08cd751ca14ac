from pathlib import Path
from weakref import ref

import numpy as np
import pytest
import torch
from torch import nn

from spd_core.component_model import ComponentModel
from spd_core.config.losses import LossesConfig
from spd_core.data import batches as batches_module
from spd_core.data.batches import Batch, Decomposition, training_batches
from spd_core.evaluate import due_metrics, evaluate
from spd_core.losses.distance import LossParts
from spd_core.step import accumulate_gradients, optimisation_step, scheduled
from spd_core.train import build_optimizer

PGD = "init:random,step_size:0.3,n_steps:3"
SHARED, UNIQUE = "scope:shared_across_batch", "scope:unique_per_datapoint"
UNIFORM, STATIC = "{kind:uniform_k_subset}", "{kind:static_probability,p:0.4}"
ANNEAL = "p_anneal_start_frac:0.0,p_anneal_end_frac:1.0,p_anneal_final_p:0.5"
EVERY_LOSS = {
    "importance_minimality": f"coeff:0.1,p:0.7,beta:0.5,{ANNEAL}",
    "faithfulness": "coeff:0.7",
    "unmasked_recon": "coeff:0.3",
    "ci_masked_recon": "coeff:0.4",
    "ci_masked_recon_subset": f"coeff:0.5,routing:{STATIC}",
    "ci_masked_recon_layerwise": "coeff:0.2",
    "stochastic_recon": "coeff:1.1",
    "stochastic_recon_subset": f"coeff:0.5,routing:{UNIFORM}",
    "stochastic_recon_layerwise": "coeff:0.9",
    "pgd_recon": f"coeff:0.8,{PGD},{SHARED}",
    "pgd_recon_subset": f"coeff:0.6,{PGD},{UNIQUE},routing:{UNIFORM}",
    "pgd_recon_layerwise": f"coeff:0.5,{PGD},{SHARED}",
    "stochastic_hidden_acts_recon": "coeff:0.4",
}
ON = tuple(f"++losses.{name}={{{options}}}" for name, options in EVERY_LOSS.items())
OTHER_SCOPES = (
    "losses.pgd_recon.scope=unique_per_datapoint",
    "losses.pgd_recon_subset.scope=shared_across_batch",
    "losses.pgd_recon_layerwise.scope=unique_per_datapoint",
)
LIVELY = ("data.feature_probability=0.6", "train.batch_size=16", "decompose.ci_fn.hidden=[8]")
STEP = 3  # of 6


def ignore(_batch):
    return {}


def kept_in(seen, of=lambda batch: batch):
    """Observes by keeping a part of every batch."""

    def observe(batch):
        seen.append(of(batch))
        return {}

    return observe


def losses_and_gradients(config, model, dist, observe=ignore):
    model.zero_grad()
    d = Decomposition(config, model, dist, None)
    batches, n_micro = training_batches(d, STEP)
    losses, _, _ = accumulate_gradients(d, batches, n_micro, scheduled(config, STEP), observe)
    return losses, {n: p.grad for n, p in model.trained_parameters().items()}


def in_parts_of(size, config):
    train = config.train.model_copy(update={"microbatch_size": size})
    return config.model_copy(update={"train": train})


def assert_same(got, wanted, **tolerance):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        if value is None:
            assert got[name] is None
        else:
            torch.testing.assert_close(
                got[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerance
            )


@pytest.fixture
def in_microbatches(make_config, tms_model, one_process):
    """Losses and gradients of one of the losses, computed in parts of some size, at step 3 of 6."""

    def run(name, size, *overrides):
        config = make_config(*ON, *LIVELY, *overrides)
        only = LossesConfig.model_validate({name: config.losses.configured()[name].model_dump()})
        config = in_parts_of(size, config.model_copy(update={"losses": only}))
        model = tms_model("decompose.ci_fn.hidden=[8]", "decompose.n_mask_samples=2", "seed=2")
        return losses_and_gradients(config, model, one_process)

    return run


# ---------------------------------------------------------------- microbatches


PGD_LOSSES = [name for name in EVERY_LOSS if name.startswith("pgd")]


@pytest.mark.parametrize(
    "name, scopes",
    [
        *(pytest.param(name, (), id=name) for name in EVERY_LOSS),
        *(pytest.param(name, OTHER_SCOPES, id=f"{name}-other_scope") for name in PGD_LOSSES),
    ],
)
def test_microbatches_change_nothing(name, scopes, in_microbatches):
    wanted, wanted_gradients = in_microbatches(name, None, *scopes)
    assert any(g is not None and g.abs().max() > 1e-4 for g in wanted_gradients.values())
    for size in (1, 4, 8):
        losses, gradients = in_microbatches(name, size, *scopes)
        assert_same(losses, wanted, atol=1e-6, rtol=1e-5)
        assert_same(gradients, wanted_gradients, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sampling", ["continuous", "binomial"])
@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_microbatches_of_sequences_change_nothing(
    distance, sampling, make_config, tms_model, one_process, monkeypatch
):
    monkeypatch.setattr(
        batches_module, "draw_examples", lambda _c, _d, r, p: r.batch_stream(p).uniform(3, 5)
    )
    options = (f"decompose.sampling={sampling}", f"decompose.distance={distance}")
    model = tms_model("decompose.ci_fn.hidden=[8]", *options)
    config = make_config(*ON, *LIVELY, *options)
    results = [
        losses_and_gradients(in_parts_of(size, config), model, one_process) for size in (None, 2, 8)
    ]
    (wanted, wanted_gradients), *others = results
    for losses, gradients in others:
        assert_same(losses, wanted, atol=1e-6, rtol=1e-5)
        assert_same(gradients, wanted_gradients, atol=1e-6, rtol=1e-5)


class Positioned(nn.Module):
    """Position embeddings run once, for all examples."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 4), nn.Embedding(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        at = self.positions(torch.arange(tokens.shape[1])[None])
        return self.head(torch.tanh(self.tokens(tokens) + at))


@pytest.mark.parametrize("sampling", ["continuous", "binomial"])
def test_microbatches_change_nothing_of_position_embeddings(
    sampling, make_config, one_process, monkeypatch
):
    monkeypatch.setattr(
        batches_module, "draw_examples", lambda _c, _d, r, p: r.batch_stream(p).integers(0, 9, 5)
    )
    config = make_config(*ON, *LIVELY, f"decompose.sampling={sampling}")
    update = {"modules": {"*": 4}, "tied": []}
    model = ComponentModel(Positioned(), config.decompose.model_copy(update=update), 0)
    (wanted, wanted_gradients), *others = (
        losses_and_gradients(in_parts_of(size, config), model, one_process) for size in (None, 2, 8)
    )
    for losses, gradients in others:
        assert_same(losses, wanted, atol=1e-6, rtol=1e-5)
        assert_same(gradients, wanted_gradients, atol=1e-6, rtol=1e-5)


def test_every_microbatch_is_observed_once(make_config, tms_model, one_process):
    seen = []
    for size in (None, 4):
        config = in_parts_of(size, make_config(*LIVELY))
        losses_and_gradients(
            config, tms_model(), one_process, kept_in(seen, lambda batch: batch.ci["linear1"])
        )
    whole, *parts = (ci.lower.detach() for ci in seen)
    assert [len(part) for part in parts] == [4] * 4
    torch.testing.assert_close(torch.cat(parts), whole)


# ---------------------------------------------------------------- a loss of the user's own


def active_features(model, batch: Batch) -> LossParts:
    """A loss whose count depends on the examples."""
    out = model.run_masked(batch.examples, {})
    return out.sum() + model.components["linear1"].V.sum(), int((batch.examples > 0).sum())


def examples(model, batch: Batch) -> LossParts:
    out = (batch.examples @ model.components["linear1"].V).square().sum()
    return out, len(batch.examples)


def own(function):
    return f"+losses.mine={{path:{__name__}.{function.__name__},coeff:1.0}}"


def test_a_count_that_differs_between_microbatches_is_refused(make_config, tms_model, one_process):
    config = make_config(*LIVELY, own(active_features), "train.microbatch_size=4")
    with pytest.raises(ValueError, match=r"losses\.mine .* train\.microbatch_size=null"):
        losses_and_gradients(config, tms_model(), one_process)
    config = make_config(*LIVELY, own(active_features))
    losses, _ = losses_and_gradients(config, tms_model(), one_process)
    assert losses["mine"].isfinite()


def test_a_loss_of_the_users_own_in_microbatches(make_config, tms_model, one_process):
    results = [
        losses_and_gradients(
            make_config(*LIVELY, own(examples), f"train.microbatch_size={size}"),
            tms_model(),
            one_process,
        )
        for size in ("null", 4)
    ]
    assert results[0][0]["mine"] > 0
    for got, wanted in zip(results[1], results[0], strict=True):
        assert_same(got, wanted, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- what is added up


def test_coefficients_weigh_losses_and_gradients(make_config, tms_model, one_process):
    """A coefficient that rises linearly from 1 to 6 over six steps is 4 at step 3."""
    schedule = "{kind:linear,start:1.0,end:6.0,warmup_fraction:0.0}"
    alone = ("losses.importance_minimality=null", "losses.stochastic_recon_layerwise=null")
    config = make_config(*LIVELY, *alone)
    losses, gradients = losses_and_gradients(config, tms_model(), one_process)
    rising = make_config(*LIVELY, *alone, f"losses.stochastic_recon.coeff={schedule}")
    same, larger = losses_and_gradients(rising, tms_model(), one_process)
    assert scheduled(rising, STEP).coeffs == {"stochastic_recon": pytest.approx(4.0)}
    assert_same(same, losses)
    assert_same(larger, {n: g if g is None else 4 * g for n, g in gradients.items()})
    model = tms_model()
    optimizer = build_optimizer(rising, model)
    result = optimisation_step(
        Decomposition(rising, model, one_process, None), optimizer, STEP, STEP, ignore
    )
    assert result.total.item() == pytest.approx(4 * losses["stochastic_recon"].item())


def test_p_is_annealed_while_training(make_config, tms_model, one_process):
    """From 2 to 1 over the whole training it is 1.5 halfway."""
    anneal = "p:2.0,p_anneal_start_frac:0.0,p_anneal_end_frac:1.0,p_anneal_final_p:1.0"
    seen = []
    config = make_config(*LIVELY, f"losses.importance_minimality={{coeff:1.0,beta:0.0,{anneal}}}")
    losses, _ = losses_and_gradients(config, tms_model(), one_process, kept_in(seen))
    (batch,) = seen
    uppers = [module.upper.detach().double().numpy() for module in batch.ci.values()]
    wanted = sum((np.maximum(u, 0) ** 1.5).mean(0).sum() for u in uppers)
    assert wanted > 0.1
    assert losses["importance_minimality"].item() == pytest.approx(wanted, rel=1e-4)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("size", [None, 4])
def test_bf16_autocast_is_close_to_float32(size, make_config, tms_model, one_process):
    off, bf16 = (make_config(*ON, *LIVELY, f"train.autocast={kind}") for kind in ("off", "bf16"))
    wanted, wanted_gradients = losses_and_gradients(off, tms_model(), one_process)
    losses, gradients = losses_and_gradients(in_parts_of(size, bf16), tms_model(), one_process)
    assert torch.equal(losses["faithfulness"], wanted["faithfulness"])
    assert not torch.equal(losses["unmasked_recon"], wanted["unmasked_recon"])
    assert_same(losses, wanted, atol=0, rtol=0.05)
    flat, wanted_flat = (
        torch.cat([g.flatten() for g in gs.values()]) for gs in (gradients, wanted_gradients)
    )
    assert flat.dtype == torch.float32
    assert (flat - wanted_flat).norm() < 0.05 * wanted_flat.norm()


def test_bf16_autocast_reaches_evaluation_but_not_faithfulness(make_config, tms_model, one_process):
    values = []
    for autocast in ("off", "bf16"):
        config = make_config(*ON, *LIVELY, f"train.autocast={autocast}")
        due = due_metrics(config, 3)
        values.append(
            evaluate(
                Decomposition(config, tms_model(), one_process, None),
                3,
                due,
                None,
                1.0,
                Path("unused"),
            )
        )
    wanted, got = values
    assert got["eval/loss/faithfulness"] == wanted["eval/loss/faithfulness"]
    for name in EVERY_LOSS:
        assert got[f"eval/loss/{name}"] == pytest.approx(wanted[f"eval/loss/{name}"], rel=0.05)


# ---------------------------------------------------------------- memory


def saved_bytes(run):
    """Of arrays that are kept for the gradients, each counted once."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    return sum(kept.values()), result


@pytest.mark.parametrize("autocast", ["off", "bf16"])
@pytest.mark.parametrize("kind", ["mlp", "vector_mlp", "shared_mlp"])
def test_checkpointed_ci_fns_keep_less_and_learn_the_same(
    kind, autocast, make_config, tms_model, one_process
):
    found, kept = {}, {}
    overrides = (*LIVELY, *ON, f"decompose.ci_fn.kind={kind}", "decompose.ci_fn.hidden=[40,30]")
    for way in ("off", "ci_fns"):
        config = make_config(
            *overrides, f"train.autocast={autocast}", f"train.activation_checkpointing={way}"
        )
        d = Decomposition(config, tms_model(*overrides[-2:]), one_process, None)
        with d.autocast():
            kept[way], _ = saved_bytes(lambda d=d: list(training_batches(d, STEP)[0]()))
        found[way] = losses_and_gradients(config, d.model, one_process)
    assert kept["ci_fns"] < 0.6 * kept["off"]
    for one, other in zip(*found.values(), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_single_batch_is_made_once(make_config, tms_model, one_process, monkeypatch):
    """Also where adversarial sources look at it before the losses do."""
    made, make = [], batches_module.make_batch
    monkeypatch.setattr(batches_module, "make_batch", lambda *a: made.append(a) or make(*a))
    config = make_config(*LIVELY, *ON)
    losses_and_gradients(config, tms_model(), one_process)
    assert len(made) == 1
    losses_and_gradients(in_parts_of(8, config), tms_model(), one_process)
    assert len(made) > 3


def test_nobody_holds_a_batch_while_gradients_are_computed(make_config, tms_model, one_process):
    """Its importances would be there beside their gradients."""
    model, seen, then = tms_model(), [], []
    first = next(iter(model.trained_parameters().values()))
    first.register_hook(lambda _: then.append([at() is None for at in seen]))
    config = make_config(*LIVELY, *ON)
    losses_and_gradients(config, model, one_process, kept_in(seen, ref))
    assert then == [[True]]
    losses_and_gradients(in_parts_of(8, config), model, one_process, kept_in(seen, ref))
    assert then == [[True], [True, True], [True, True, True]]
