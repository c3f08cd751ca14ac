"""Language models under masks, against numpy: a forward pass, cross entropy and KL by hand."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from test_masks import written_down
from test_text import make as text
from torch import nn

from spd_core.ci_fns import CausalImportance
from spd_core.component_model import ComponentModel
from spd_core.config import RunConfig
from spd_core.config.metrics import ModuleSet
from spd_core.data.batches import Batch, Decomposition
from spd_core.evaluate import check_metrics, evaluate
from spd_core.metrics import means
from spd_core.metrics.outputs import ce_and_kl_sums, subset_ce_and_kl_sums
from spd_core.randomness import StepRandomness
from spd_launch.compose import compose
from spd_launch.errors import LaunchError
from spd_launch.validate import validate

CPU = torch.device("cpu")
VOCAB, SEQ = 7, 6
MODULES = {"embed": 5, "mix": 6, "head": 4}
KINDS = {"unmasked", "ci_masked", "stochastic_masked", "random_masked", "rounded_masked",
         "zero_masked"}  # fmt: skip


class TinyLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 4)
        self.mix = nn.Linear(4, 5)
        self.head = nn.Linear(5, VOCAB)

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.embed(tokens))))


def logits_numpy(model, tokens, masks):
    """The model with the modules of `masks` on their components; tokens are one-hot vectors."""
    x = np.eye(VOCAB)[tokens]
    for name in MODULES:
        module = model.target.get_submodule(name)
        weight = module.weight.detach().double().numpy()
        W, b = (weight, 0) if name == "embed" else (weight.T, module.bias.detach().numpy())
        out = x @ W
        if name in masks:
            V, U = (p.detach().double().numpy() for p in
                    (model.components[name].V, model.components[name].U))  # fmt: skip
            out = ((x @ V) * masks[name].mask.double().numpy()) @ U
            if masks[name].delta_mask is not None:
                out += masks[name].delta_mask.double().numpy()[..., None] * (x @ (W - V @ U))
        x = np.tanh(out + b) if name == "mix" else out + b
    return x


def ce_numpy(logits, tokens):
    """Sum over examples and over positions but the last of -log p(next token)."""
    log_p, total = log_softmax(logits, -1), 0.0
    for example, row in enumerate(np.asarray(tokens)):
        total -= sum(log_p[example, t, row[t + 1]] for t in range(len(row) - 1))
    return total


def kl_numpy(logits, target_logits):
    log_p, log_t = log_softmax(logits, -1), log_softmax(target_logits, -1)
    return (np.exp(log_t) * (log_t - log_p)).sum()


@pytest.fixture
def language_model(make_config):
    """A tiny language model, and batches of it with random causal importances."""

    def make(*overrides):
        update = {"modules": MODULES, "tied": []}
        decompose = make_config(*overrides).decompose.model_copy(update=update)
        return ComponentModel(TinyLM(), decompose, 0).requires_grad_(False)

    return make


def batch_of(model, tokens, lower=None):
    lower = lower or {n: torch.rand(*tokens.shape, C) for n, C in MODULES.items()}
    ci = {n: CausalImportance(v, v, "leaky_hard") for n, v in lower.items()}
    target_out, inputs = model.run_target(tokens)
    randomness = StepRandomness(0, 0, 0, 1, len(tokens), torch.device("cpu"))
    return Batch(tokens, target_out, inputs, ci, randomness, {})


def spied(model, monkeypatch):
    """The masks of every pass through the model from now on."""
    passes, run_masked = [], model.run_masked
    monkeypatch.setattr(
        model, "run_masked", lambda x, m: passes.append(written_down(m)) or run_masked(x, m)
    )
    return passes


@pytest.mark.parametrize("delta", ["true", "false"])
def test_six_kinds_of_masks(delta, language_model, monkeypatch):
    model = language_model(f"decompose.delta_component={delta}")
    tokens = torch.randint(0, VOCAB, (3, SEQ))
    batch = batch_of(model, tokens)
    passes = spied(model, monkeypatch)
    sums = ce_and_kl_sums(model, batch, rounding_threshold=0.6)
    kinds = [key.removeprefix("kl/") for key in sums if key.startswith("kl/")]
    masks = dict(zip(kinds, passes, strict=True))
    assert masks.keys() == KINDS
    for name, ci in batch.ci.items():
        m = {kind: of_kind[name].mask for kind, of_kind in masks.items()}
        assert (m["unmasked"] == 1).all() and (m["zero_masked"] == 0).all()
        assert torch.equal(m["ci_masked"], ci.lower)
        assert torch.equal(m["rounded_masked"], (ci.lower > 0.6).float())
        assert 0 < m["random_masked"].mean() < 1 and m["random_masked"].min() < ci.lower.min() + 0.1
        assert (ci.lower <= m["stochastic_masked"]).all() and (m["stochastic_masked"] <= 1).all()
        deltas = {kind for kind, of_kind in masks.items() if of_kind[name].delta_mask is not None}
        assert deltas == ({"stochastic_masked"} if delta == "true" else set())
    target = logits_numpy(model, tokens, {})
    got = means(sums)
    n, ce_target = 3 * (SEQ - 1), ce_numpy(target, tokens)
    assert got.pop("ce/target") == pytest.approx(ce_target / n, rel=1e-5)
    lost = ce_numpy(logits_numpy(model, tokens, masks["zero_masked"]), tokens) - ce_target
    for kind in KINDS:
        logits = logits_numpy(model, tokens, masks[kind])
        difference = ce_numpy(logits, tokens) - ce_target
        assert got.pop(f"kl/{kind}") == pytest.approx(
            kl_numpy(logits, target) / (3 * SEQ), rel=1e-4
        )
        assert got.pop(f"ce_difference/{kind}") == pytest.approx(difference / n, rel=1e-3, abs=1e-6)
        assert got.pop(f"ce_unrecovered/{kind}") == pytest.approx(difference / lost, rel=1e-3)
    assert got == {}


def test_the_token_of_position_0_is_no_label(language_model):
    """Tokens 0 and 1 are alike to the model, so that only labels could tell them apart."""
    model = language_model()
    model.target.embed.weight.data[0] = model.target.embed.weight.data[1]
    tokens = torch.randint(2, VOCAB, (3, SEQ))
    pairs = []
    for first in (0, 1):
        tokens[:, 0] = first
        pairs.append(ce_and_kl_sums(model, batch_of(model, tokens), 0.5)["ce/target"].tolist())
    assert pairs[0] == pairs[1] and pairs[0][1] == 3 * (SEQ - 1)
    tokens[:, -1] = torch.randint(0, 2, (3,))
    assert ce_and_kl_sums(model, batch_of(model, tokens), 0.5)["ce/target"][0] != pairs[0][0]


def test_sums_of_parts_add_up(language_model):
    model = language_model()
    tokens = torch.randint(0, VOCAB, (5, SEQ))
    lower = {n: torch.rand(5, SEQ, C) for n, C in MODULES.items()}
    whole = ce_and_kl_sums(model, batch_of(model, tokens, lower), 0.5)
    first, second = (
        ce_and_kl_sums(model, batch_of(model, tokens[s], {n: v[s] for n, v in lower.items()}), 0.5)
        for s in (slice(0, 2), slice(2, 5))
    )
    for sums in (whole, first, second):
        sums["ce/ci_masked"] = sums["ce/target"] + sums["ce_difference/ci_masked"]
    for key in ("ce/target", "ce/ci_masked", "kl/ci_masked", "kl/rounded_masked", "kl/zero_masked"):
        torch.testing.assert_close((first[key] + second[key]).float(), whole[key].float())


def test_named_sets_of_modules(language_model, monkeypatch):
    model = language_model("decompose.n_mask_samples=2")
    tokens = torch.randint(0, VOCAB, (3, SEQ))
    subsets = {
        "all but h*": ModuleSet(include=["*"], exclude=["h*"]),
        "a/head": ModuleSet(include=["mix", "head"], exclude=["m?x"]),
    }
    batch, passes = batch_of(model, tokens), spied(model, monkeypatch)
    got = means(subset_ce_and_kl_sums(model, batch, subsets))
    by_modules = {
        names: [masks for masks in passes if tuple(masks) == names and not is_zero(masks)]
        for names in (("embed", "mix"), ("head",))
    }
    zero = next(masks for masks in passes if is_zero(masks))
    assert tuple(zero) == tuple(MODULES)
    target = logits_numpy(model, tokens, {})
    lost = ce_numpy(logits_numpy(model, tokens, zero), tokens) - ce_numpy(target, tokens)
    for subset, masks in zip(subsets, by_modules.values(), strict=True):
        assert len(masks) == 2 and not torch.equal(*[next(iter(m.values())).mask for m in masks])
        logits = [logits_numpy(model, tokens, m) for m in masks]
        kl = np.mean([kl_numpy(x, target) for x in logits]) / (3 * SEQ)
        difference = np.mean([ce_numpy(x, tokens) for x in logits]) - ce_numpy(target, tokens)
        assert got[f"kl/{subset}"] == pytest.approx(kl, rel=1e-4)
        assert got[f"ce_unrecovered/{subset}"] == pytest.approx(difference / lost, rel=1e-3)
        assert all(m.delta_mask is not None for one in masks for m in one.values())


def is_zero(masks):
    return all((info.mask == 0).all() for info in masks.values())


def test_where_zero_masks_lose_nothing_no_fraction_is_made_up(language_model):
    """Weights of zero: whatever the masks, nothing but the biases is left."""
    model = language_model("decompose.delta_component=false")
    for name, c in model.components.items():
        for weight in (c.weight, c.U, model.target.get_submodule(name).weight):
            weight.zero_()
    tokens = torch.randint(0, VOCAB, (3, SEQ))
    values = means(ce_and_kl_sums(model, batch_of(model, tokens), 0.5))
    assert values["ce_difference/ci_masked"] == 0 and np.isnan(values["ce_unrecovered/ci_masked"])


CE = {"ce_and_kl": {"when": "fast", "rounding_threshold": 0.5}}


def subsets(name, include):
    of_one = {name: {"include": [include], "exclude": []}}
    return {"stochastic_recon_subset_ce_and_kl": {"when": "fast", "subsets": of_one}}


def of_text(config, *metrics):
    """The config with these metrics only, and text for a target that takes any data."""
    values = config.model_dump(mode="json")
    custom = {"kind": "custom", "class_path": "torch.nn.Linear", "pretrained": None}
    values["target"] = custom | {"n_features": None, "output": None}
    values["data"] = text().model_dump(mode="json")
    values["eval"]["metrics"] = {name: o for of_one in metrics for name, o in of_one.items()}
    return RunConfig.model_validate(values)


def test_an_evaluation_of_a_language_model(make_config, one_process, tmp_path, monkeypatch):
    """Exact components: with all of them the model is the target, with none it is not."""
    config = of_text(make_config(), CE, subsets("head", "head"))
    update = {"modules": {"mix": 4, "head": 5}, "tied": []}
    model = ComponentModel(TinyLM(), config.decompose.model_copy(update=update), 0)
    for c in model.components.values():
        c.V.data, c.U.data = torch.eye(c.C), c.weight.T
    generator = torch.Generator().manual_seed(1)
    drawn = []

    def draw(*_):
        drawn.append(torch.randint(0, VOCAB, (32, SEQ), generator=generator))
        return drawn[-1]

    monkeypatch.setattr("spd_core.data.batches.draw_examples", draw)
    d, metrics = Decomposition(config, model, one_process, None), config.eval.metrics.configured()
    got = evaluate(d, 3, metrics, None, 1.0, tmp_path)
    tokens = torch.cat(drawn)
    assert len(tokens) == 64
    ce = ce_numpy(logits_numpy(model, tokens, {}), tokens) / (64 * (SEQ - 1))
    assert got["eval/ce_and_kl/ce/target"] == pytest.approx(ce, rel=1e-5)
    for key in ("kl", "ce_difference", "ce_unrecovered"):
        assert got[f"eval/ce_and_kl/{key}/unmasked"] == pytest.approx(0, abs=1e-5)
        assert f"eval/stochastic_recon_subset_ce_and_kl/{key}/head" in got
    assert got["eval/ce_and_kl/ce_unrecovered/zero_masked"] == pytest.approx(1)
    assert got["eval/ce_and_kl/kl/zero_masked"] > 1e-3


@pytest.mark.parametrize("metric, message", [
    (subsets("a", "attn*"), "subsets.a holds no module; decomposed are linear1, linear2"),
    (subsets("target", "*"), "subsets.target is a name that is taken"),
    (subsets("zero_masked", "*"), "subsets.zero_masked is a name that is taken"),
])  # fmt: skip
def test_sets_of_modules_that_do_not_fit_are_refused(metric, message, make_config, tms_model):
    with pytest.raises(ValueError, match=message):
        check_metrics(of_text(make_config(), metric), tms_model())


@pytest.mark.parametrize("experiment", ["tms_5-2", "ih"])
@pytest.mark.parametrize("metric", [
    "ce_and_kl={when:fast,rounding_threshold:0.5}",
    "stochastic_recon_subset_ce_and_kl={when:fast,subsets:{a:{include:['*'],exclude:[]}}}",
])  # fmt: skip
def test_what_needs_a_language_model_is_refused_before_anything_is_sent(metric, experiment):
    name = metric.split("=")[0]
    arguments = [f"+experiment={experiment}", "cluster=local", f"+eval.metrics.{metric}"]
    with pytest.raises(LaunchError, match=rf"metrics\.{name}, which takes text; .*=null"):
        validate(compose(arguments, multirun=False)[0].values)
