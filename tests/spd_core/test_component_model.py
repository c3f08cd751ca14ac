import copy
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from spd_core.component_model import Cache, ComponentModel, MaskInfo, expand_patterns
from spd_core.data.batches import Batch
from spd_core.masks import stochastic_masks
from spd_core.randomness import StepRandomness
from spd_core.rows import Rows


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3, bias=False))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.mlp(x))


@pytest.fixture
def decompose(make_config):
    """Components beside a target: pattern -> C, and what else differs from the small config."""

    def build(target, modules, output=None, **update):
        config = make_config().decompose.model_copy(
            update={"modules": modules, "tied": [], **update}
        )
        return ComponentModel(target, config, 0, output)

    return build


@pytest.fixture
def model(decompose):
    return decompose(Net(), {"mlp.*": 5, "head": 3})


def masks_of_ones(model, inputs):
    """Mask and delta mask of ones, at every position of every module."""
    masks = {}
    for name, x in inputs.items():
        positions = x.shape[:-1] if x.is_floating_point() else x.shape
        C = model.components[name].C
        masks[name] = MaskInfo(torch.ones(*positions, C), torch.ones(positions), None)
    return masks


def masked_linear(module, components, x, info):
    """((x V) * m) U + m_d x (W - (V U)^T)^T + b, in numpy."""
    V, U, W, x = (
        t.detach().double().numpy() for t in (components.V, components.U, module.weight, x)
    )
    out = ((x @ V) * info.mask.numpy()) @ U
    if info.delta_mask is not None:
        out = out + info.delta_mask[..., None].numpy() * (x @ (W.T - V @ U))
    return out if module.bias is None else out + module.bias.numpy()


def has_hooks(model):
    return any(m._forward_hooks for m in model.target.modules())


def test_patterns_give_modules_in_the_targets_order():
    assert expand_patterns(Net(), {"head": 3, "mlp.[02]": 5}, "decompose.modules") == {
        "mlp.0": 5,
        "mlp.2": 5,
        "head": 3,
    }


@pytest.mark.parametrize("patterns, named", [
    ({"mlp.*": 5, "tail*": 2}, "tail"),
    ({"mlp.*": 5, "*.0": 2}, "mlp.0"),
    ({"mlp.1": 5}, "mlp.1"),
])  # fmt: skip
def test_patterns_without_a_match_and_double_matches_are_errors(patterns, named):
    with pytest.raises(ValueError, match=named):
        expand_patterns(Net(), patterns, "decompose.modules")


def test_the_target_is_frozen_and_everything_else_trains(model):
    model.run_target(torch.randn(2, 4))
    assert not any(p.requires_grad for p in model.target.parameters())
    trained = model.trained_parameters()
    assert all(p.requires_grad for p in trained.values())
    assert len(trained) == len(model.component_parameters()) + len(model.ci_fn_parameters())
    assert sum("components" in name for name in trained) == 6


def test_run_target_gives_inputs_of_every_module(model):
    x = torch.randn(7, 4)
    out, inputs = model.run_target(x)
    torch.testing.assert_close(out, Net.forward(model.target, x))
    torch.testing.assert_close(inputs["mlp.0"], x)
    torch.testing.assert_close(model.target.head(inputs["head"]), out)


def test_masks_for_a_subset_replace_only_those(model):
    x = torch.randn(7, 4)
    mask = torch.rand(7, 5)
    out = model.run_masked(x, {"mlp.2": MaskInfo(mask, None, None)})
    c = model.components["mlp.2"]
    hidden = F.gelu(x @ model.target.mlp[0].weight.T + model.target.mlp[0].bias)
    wanted = model.target.head(((hidden @ c.V) * mask) @ c.U)
    torch.testing.assert_close(out, wanted)
    assert torch.equal(model.run_masked(x, {}), model.target(x))


def test_routes_choose_per_position(model):
    x = torch.randn(7, 4)
    route = torch.tensor([True, False, True, False, False, True, True])
    mask, rows = MaskInfo(torch.rand(7, 3), None, None), Rows.of(route)
    everywhere = model.run_masked(x, {"head": mask})
    out = model.run_masked(x, {"head": MaskInfo(mask.mask[rows.index], None, rows)})
    torch.testing.assert_close(out[route], everywhere[route])
    torch.testing.assert_close(out[~route], model.target(x)[~route])


def test_routes_choose_per_position_of_a_sequence(model):
    x, route = torch.randn(2, 5, 4), torch.rand(2, 5) < 0.5
    info, rows = MaskInfo(torch.rand(2, 5, 3), torch.rand(2, 5), None), Rows.of(route)
    at = [values.flatten(0, 1)[rows.index] for values in (info.mask, info.delta_mask)]
    out = model.run_masked(x, {"head": MaskInfo(*at, rows)}).detach()
    inputs, head = model.run_target(x)[1]["head"], model.target.head
    masked = masked_linear(head, model.components["head"], inputs, info)
    plain = inputs.numpy() @ head.weight.numpy().T + head.bias.numpy()
    for place in np.ndindex(2, 5):
        wanted = masked[place] if route[place] else plain[place]
        np.testing.assert_allclose(out[place], wanted, atol=1e-5)


def test_routes_that_no_one_counts_give_the_same(model):
    """Which positions: by their numbers, or, where a GPU is not waited for, by yes or no."""
    x, route = torch.randn(2, 5, 4), torch.rand(2, 5) < 0.5
    mask, m_d, rows = torch.rand(2, 5, 3), torch.rand(2, 5), Rows.of(route)
    at = [values.flatten(0, 1)[rows.index] for values in (mask, m_d)]
    found = []
    for info in (MaskInfo(*at, rows), MaskInfo(mask, m_d, route)):
        out, parameters = model.run_masked(x, {"head": info}), model.component_parameters()
        gradients = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
        found.append([out, *(g for g in gradients if g is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_position_embeddings_run_once_and_are_routed_for_every_example(decompose):
    """What they give one example where they are masked, others do not see."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wpe, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x + self.wpe(torch.arange(5)[None]))

    model, x = decompose(random_weights(Positions()), {"wpe": 6}), torch.randn(2, 5, 4)
    route = torch.tensor([[True, False, True, False, False], [False, False, True, True, False]])
    rows = Rows.of(route)
    mask = torch.rand(2, 5, 6)
    info = MaskInfo(mask.flatten(0, 1)[rows.index], None, rows)
    out, c, target = model.run_masked(x, {"wpe": info}), model.components["wpe"], model.target
    masked = (c.V * mask) @ c.U
    wanted = target.head(x + torch.where(route[..., None], masked, target.wpe.weight))
    torch.testing.assert_close(out, wanted)


def test_a_cache_holds_what_every_module_sees_in_the_masked_pass(model):
    x, info, cache = torch.randn(7, 4), MaskInfo(torch.rand(7, 5), torch.rand(7), None), Cache()
    out = model.run_masked(x, {"mlp.2": info}, cache)
    first, _, second = model.target.mlp
    hidden = F.gelu(F.linear(x, first.weight, first.bias))
    seen = masked_linear(second, model.components["mlp.2"], hidden, info)
    for name, wanted in {"mlp.0": x, "mlp.2": hidden, "head": seen}.items():
        np.testing.assert_allclose(cache.inputs[name].detach(), wanted, atol=1e-5)
        acts = np.asarray(wanted) @ model.components[name].V.detach().numpy()
        np.testing.assert_allclose(cache.inner_acts[name].detach(), acts, atol=1e-5)
    assert torch.equal(out, model.run_masked(x, {"mlp.2": info}))


def test_gradients_flow_through_the_cache(model):
    cache = Cache()
    model.run_masked(torch.randn(7, 4), {"mlp.0": MaskInfo(torch.rand(7, 5), None, None)}, cache)
    for cached, trained in ((cache.inputs, "mlp.0"), (cache.inner_acts, "head")):
        V = model.components[trained].V
        (gradient,) = torch.autograd.grad(cached["head"].sum(), V, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_hooks_are_gone_after_an_exception(model):
    x = torch.randn(7, 4)
    before = model.target(x)
    with pytest.raises(RuntimeError):
        model.run_masked(x, {"mlp.0": MaskInfo(torch.zeros(7, 4), None, None)})
    with pytest.raises(RuntimeError):
        model.run_target(torch.randn(7, 5))
    assert torch.equal(model.target(x), before)
    assert not has_hooks(model)


@pytest.mark.parametrize("run", [
    lambda model, x: model.run_target(x),
    lambda model, x: model.run_masked(x, {"head": MaskInfo(None, None, None)}),
    lambda model, x: model.run_masked(x, {}, Cache()),
])  # fmt: skip
def test_hooks_are_gone_after_an_exception_of_the_target(run, model):
    model.target.mlp[1].forward = lambda _x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(model, torch.randn(7, 4))
    assert not has_hooks(model)


def test_gradients_reach_components_and_ci_fns_but_not_the_target(model):
    x = torch.randn(7, 4)
    _, inputs = model.run_target(x)
    ci, _ = model.causal_importances(inputs, None, "off")
    masks = {n: MaskInfo(c.lower, None, None) for n, c in ci.items()}
    (-model.run_masked(x, masks)).square().sum().backward()
    assert all(p.grad is not None for p in model.trained_parameters().values())
    assert all(p.grad is None for p in model.target.parameters())


def test_tied_modules(tms_model):
    model = tms_model()
    first, second = model.components["linear1"], model.components["linear2"]
    assert torch.equal(first.V, second.U.T) and torch.equal(first.U, second.V.T)
    with pytest.raises(ValueError, match="linear2"):
        tms_model("~decompose.modules.linear2")


def test_binomial_jitter_is_on_only_with_noise(tms_model):
    model = tms_model("decompose.sampling=binomial", "decompose.sigmoid=normal")
    noise = StepRandomness(0, 0, 0, 1, 8, torch.device("cpu")).batch_stream("n")
    _, inputs = model.run_target(torch.rand(8, 5))
    with_noise, without = (
        model.causal_importances(inputs, n, "off")[0]["linear1"] for n in (noise, None)
    )
    g = without.pre_sigmoid
    torch.testing.assert_close(without.lower, torch.sigmoid(g))
    u = (1.05 * g - torch.logit(with_noise.lower)) / 0.05
    assert u.min() > -1e-3 and u.max() < 1 + 1e-3 and u.std() > 0.1


# ------------------------------------------------------------------ whole models


class Words(nn.Module):
    """A module of every call style; the last one is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4, padding_idx=0)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 9)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(input=self.body(self.embed(input=tokens)))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 12, "n_layer": 2, "n_head": 3}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes, **heads))


def bert():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    return BertModel(BertConfig(vocab_size=20, **sizes, num_attention_heads=3))


def random_weights(target):
    """Weights so large that every module matters to the output."""
    for name, p in target.named_parameters():
        if "norm" not in name.lower() and "ln_" not in name:
            nn.init.normal_(p, std=0.3)
    return target


TOKENS = torch.tensor([[3, 1, 4, 1, 5], [8, 2, 6, 0, 0]])
GPT2_PATTERNS = {"*.wte": 7, "*.c_attn": 5, "*.c_proj": 6, "*.c_fc": 4, "lm_head": 8}
TARGETS = {
    "mlp": (Net, {"mlp.*": 5, "head": 3}, None, torch.linspace(-1, 1, 28).view(7, 4)),
    "words": (Words, {"*": 5}, None, TOKENS),
    "gpt2": (gpt2, GPT2_PATTERNS, "logits", TOKENS),
    "llama": (llama, {"*_proj": 5}, "logits", TOKENS),
    "bert": (bert, {"encoder.*": 5, "*.word_embeddings": 7}, "last_hidden_state", TOKENS),
}
every_target = pytest.mark.parametrize(
    "make, patterns, output, batch", TARGETS.values(), ids=TARGETS
)


def same_everywhere(model, delta):
    """Random masks without a position, so that they amount to other weights of the target."""
    return {
        name: MaskInfo(torch.rand(c.C), torch.rand(()) if delta else None, None)
        for name, c in model.components.items()
    }


def with_masked_weights(model, masks):
    """A copy of the target in double precision, holding sum_k m_k V_k U_k + m_d (W - V U)."""
    edited = copy.deepcopy(model.target).double()
    for name, info in masks.items():
        module, c = edited.get_submodule(name), model.components[name]
        V, U = c.V.detach().double().numpy(), c.U.detach().double().numpy()
        d_in_first = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
        W = module.weight.numpy() if d_in_first else module.weight.numpy().T
        rank_ones = [np.outer(V[:, k], U[k]) for k in range(c.C)]
        weight = sum(info.mask[k].item() * rank_ones[k] for k in range(c.C))
        if info.delta_mask is not None:
            weight = weight + info.delta_mask.item() * (W - sum(rank_ones))
        # A new parameter, so that one tied to the old one stays as it is.
        weight = torch.tensor(weight if d_in_first else weight.T)
        module.weight = nn.Parameter(weight, requires_grad=False)
    return edited


@every_target
def test_all_ones_with_delta_is_the_target(make, patterns, output, batch, decompose):
    model = decompose(random_weights(make()), patterns, output)
    out, inputs = model.run_target(batch)
    assert out.abs().max() > 0.1
    masked = model.run_masked(batch, masks_of_ones(model, inputs))
    torch.testing.assert_close(masked, out, atol=1e-5, rtol=0)


@every_target
@pytest.mark.parametrize("delta", [True, False])
def test_masks_that_are_the_same_everywhere_edit_the_weights(
    make, patterns, output, batch, delta, decompose
):
    model = decompose(random_weights(make()), patterns, output)
    masks = same_everywhere(model, delta)
    edited = with_masked_weights(model, masks)
    wanted = edited(batch.double() if batch.is_floating_point() else batch)
    wanted = wanted if output is None else getattr(wanted, output)
    assert (wanted - model.run_target(batch)[0]).abs().max() > 0.1
    out = model.run_masked(batch, masks).double()
    torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)


@every_target
def test_decomposing_leaves_the_state_dict_alone(make, patterns, output, batch, decompose):
    target = random_weights(make())
    before = {name: t.clone() for name, t in target.state_dict().items()}
    model = decompose(target, patterns, output)
    model.run_masked(batch, same_everywhere(model, True)).sum().backward()
    torch.optim.SGD(model.trained_parameters().values(), lr=1.0).step()
    after = target.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_tied_embedding_is_masked_by_itself(decompose):
    model = decompose(random_weights(gpt2()), GPT2_PATTERNS, "logits")
    target, masks = model.target, same_everywhere(model, True)
    assert target.lm_head.weight is target.transformer.wte.weight
    for name in ("transformer.wte", "lm_head"):
        edited = with_masked_weights(model, {name: masks[name]})
        out = model.run_masked(TOKENS, {name: masks[name]}).double()
        torch.testing.assert_close(out, edited(TOKENS).logits, atol=1e-4, rtol=1e-4)


def test_stochastic_masks_train_every_module_of_a_transformer(decompose):
    model = decompose(random_weights(gpt2()), GPT2_PATTERNS, "logits")
    _, inputs = model.run_target(TOKENS)
    ci, _ = model.causal_importances(inputs, None, "off")
    assert {name: c.upper.shape for name, c in ci.items()} == {
        name: (*TOKENS.shape, c.C) for name, c in model.components.items()
    }
    randomness = StepRandomness(0, 0, 0, 1, 2, torch.device("cpu"))
    batch = Batch(TOKENS, TOKENS, inputs, ci, randomness, {})
    masks = stochastic_masks(model, batch, dict.fromkeys(ci), "masks")
    model.run_masked(TOKENS, masks).square().sum().backward()
    assert all(p.grad is not None for p in model.trained_parameters().values())


# ------------------------------------------------------------------ what a target returns


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor
    loss: None = None


Pair = namedtuple("Pair", ["logits", "hidden"])


def as_dict(logits, hidden):
    return {"logits": logits, "hidden": hidden}


def as_tuple(*tensors):
    return tensors


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.linear(x), x)


@pytest.mark.parametrize("output, wrap", [
    ("logits", Output), ("logits", Pair), ("logits", as_dict), (0, as_tuple), (-2, Pair),
])  # fmt: skip
def test_the_output_is_an_attribute_or_an_index(output, wrap, decompose):
    model, x = decompose(Wrapped(wrap), {"linear": 5}, output), torch.randn(2, 4)
    out, _ = model.run_target(x)
    assert torch.equal(out, model.target.linear(x))
    info = MaskInfo(torch.rand(2, 5), None, None)
    wanted = masked_linear(model.target.linear, model.components["linear"], x, info)
    np.testing.assert_allclose(model.run_masked(x, {"linear": info}).detach(), wanted, atol=1e-5)


@pytest.mark.parametrize("output, wrap, there", [
    (None, Output, "logits, hidden, loss"),
    ("loss", Output, "logits, hidden, loss"),
    (0, Output, "logits, hidden, loss"),
    ("tail", Pair, "logits, hidden"),
    ("tail", as_dict, "logits, hidden"),
    (1, as_dict, "logits, hidden"),
    (None, as_tuple, "0, 1"),
    (2, as_tuple, "0, 1"),
    ("logits", as_tuple, "0, 1"),
    (0, lambda logits, _: logits, "returns a tensor"),
    ("T", lambda logits, _: logits, "returns a tensor"),
    (None, lambda *_: None, "NoneType"),
])  # fmt: skip
def test_an_output_that_is_no_tensor_is_refused_with_what_there_is(output, wrap, there, decompose):
    model = decompose(Wrapped(wrap), {"linear": 5}, output)
    for run in (model.run_target, lambda x: model.run_masked(x, {})):
        with pytest.raises(ValueError, match=rf"target\.output={output}: .*{there}"):
            run(torch.randn(2, 4))
    assert not has_hooks(model)


# ------------------------------------------------------------------ how a module is called


class Calls(nn.Module):
    """A target that calls its one module in the given way."""

    def __init__(self, call, part=None):
        super().__init__()
        self.call = call
        self.part = nn.Linear(4, 4) if part is None else part

    def forward(self, x):
        return self.call(self.part, x)


class ScaledEmbedding(nn.Embedding):
    def forward(self, tokens):
        return 3 * super().forward(tokens)


class Reversed(nn.Linear):
    def forward(self, x):
        return super().forward(x).flip(-1)


class Halved(nn.Linear):
    """As many codebases cast: half precision for the product, the weight as it is."""

    def forward(self, x):
        return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).float()


class Scales(nn.Linear):
    def forward(self, x, factor):
        return super().forward(x) * factor


class Paired(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


def changes_input(part, x):
    hidden = 2 * x
    out = part(hidden)
    hidden += 1
    return out + hidden


def with_a_pair_as_output():
    part = nn.Linear(4, 4)
    part.register_forward_hook(lambda _module, _args, out: (out, None))
    return part


REFUSED = {
    "returns a tuple": Calls(lambda part, x: part(x)[0], with_a_pair_as_output()),
    "more than once": Calls(lambda part, x: part(part(x))),
    "is never called": Calls(lambda part, x: F.linear(x, part.weight)),
    "changed in place": Calls(changes_input),
    "an input of 6 rows for 2 examples": Calls(lambda part, x: part(x.repeat(3, 1))[:2]),
    "an input of 4 rows for 2 examples": Calls(lambda part, x: x + part(x[0])),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_module_that_masks_cannot_follow_is_refused_by_name(reason, decompose):
    model = decompose(REFUSED[reason], {"part": 5})
    own_hooks = has_hooks(model)
    with pytest.raises(ValueError, match=f"'part' .*{reason}"):
        model.run_target(torch.ones(2, 4))
    assert has_hooks(model) == own_hooks


@pytest.mark.parametrize("part", [
    Scales(4, 4), Paired(4, 4), Reversed(4, 4), Halved(4, 4), ScaledEmbedding(9, 4),
])  # fmt: skip
def test_a_module_with_a_forward_of_its_own_is_refused_by_name(part, decompose):
    kind = type(part).__name__
    for field in ("modules", "identity_modules"):
        patterns = {"modules": {}, field: {"part": 5}}
        with pytest.raises(ValueError, match=rf"decompose\.{field}: 'part' is a {kind}, whose for"):
            decompose(Calls(lambda part, x: part(x), part), **patterns)


def test_the_unread_projection_of_torchs_attention_is_refused_by_name(decompose):
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    model = decompose(Calls(lambda part, x: part(x, x, x)[0], attention), {"part.*": 5})
    with pytest.raises(ValueError, match=r"'part\.out_proj' is never called"):
        model.run_target(torch.randn(2, 3, 4))


def test_an_embedding_that_rescales_its_weight_is_refused_by_name(decompose):
    with pytest.raises(ValueError, match=r"'part' .*max_norm=1\.0"):
        decompose(Calls(lambda part, x: part(x), nn.Embedding(9, 4, max_norm=1.0)), {"*": 5})


@pytest.mark.parametrize("call, part", [
    (lambda part, x: part(input=x), nn.Linear(4, 4)),
    (lambda part, x: part(x).relu_(), nn.Linear(4, 4, bias=False)),
    (lambda part, x: part(x), NonDynamicallyQuantizableLinear(4, 4)),
], ids=["keyword", "output changed in place", "subclass"])  # fmt: skip
def test_other_ways_of_calling_a_module_work(call, part, decompose):
    model, x = decompose(Calls(call, part), {"part": 5}), torch.randn(2, 4)
    info = MaskInfo(torch.rand(2, 5), torch.rand(2), None)
    _, inputs = model.run_target(x)
    assert torch.equal(inputs["part"], x)
    wanted = masked_linear(part, model.components["part"], x, info)
    out = model.run_masked(x, {"part": info})
    out.sum().backward()
    wanted = wanted.clip(0) if part.bias is None else wanted
    np.testing.assert_allclose(out.detach(), wanted, atol=1e-5)


@pytest.mark.parametrize("names", [["values"], ["a-b", "a_b"], ["keys", "items"]])
def test_any_name_of_a_module_will_do(names, decompose):
    target = nn.Sequential()
    for name in names:
        target.add_module(name, nn.Linear(4, 4))
    model = decompose(target, {"*": 5})
    assert list(model.components) == names
    assert len(model.component_parameters()) == 2 * len(names)


def test_paths_that_differ_in_a_dot_and_a_dash_are_two(decompose):
    target = nn.Sequential()
    target.add_module("a", nn.Sequential())
    target.a.add_module("b", nn.Linear(4, 4))
    target.add_module("a-b", nn.Linear(4, 4))
    trained = decompose(target, {"*": 5}).trained_parameters()
    assert {"components.a.b.V", "components.a-b.V"} <= trained.keys()


def test_a_target_may_be_one_bare_module(decompose):
    model, x = decompose(nn.Linear(4, 3), {"*": 5}), torch.randn(2, 4)
    out, inputs = model.run_target(x)
    torch.testing.assert_close(model.run_masked(x, masks_of_ones(model, inputs)), out)


# ------------------------------------------------------------------ identities


def test_identities_are_named_by_their_module_and_no_pattern_of_modules_matches_them(decompose):
    model = decompose(Net(), {"*": 5}, identity_modules={"mlp.0": 2, "head": 3})
    assert {name: c.C for name, c in model.components.items()} == {
        "mlp.0": 5, "mlp.2": 5, "head": 5, "mlp.0.pre_identity": 2, "head.pre_identity": 3,
    }  # fmt: skip


@pytest.mark.parametrize("target, patterns, batch, output", [
    (Net, {"*": 2}, torch.linspace(-1, 1, 28).view(7, 4), None),
    (gpt2, {"*.c_*": 2, "lm_head": 3}, TOKENS, "logits"),
])  # fmt: skip
def test_identities_with_all_ones_and_delta_change_nothing(
    target, patterns, batch, output, decompose
):
    target = random_weights(target()).eval()
    wanted, names = target(batch), set(target.state_dict())
    model = decompose(target, patterns, output, identity_modules=patterns)
    out, inputs = model.run_target(batch)
    assert torch.equal(out, wanted if output is None else wanted[output])
    assert names == set(target.state_dict())
    masked = model.run_masked(batch, masks_of_ones(model, inputs))
    torch.testing.assert_close(masked, out, atol=1e-5, rtol=0)


def test_an_identity_is_no_module_for_a_pattern_to_match(decompose):
    with pytest.raises(ValueError, match=r"decompose\.modules: pattern '\*\.pre_identity'"):
        decompose(Net(), {"head": 5, "*.pre_identity": 5}, identity_modules={"head": 3})


def test_an_identity_is_an_eye_of_the_type_of_its_module(decompose):
    model = decompose(Net().double(), {"head": 5}, identity_modules={"head": 3})
    eye = model.components["head.pre_identity"].weight
    assert torch.equal(eye, torch.eye(3, dtype=torch.float64)) and eye.dtype == torch.float64


def test_a_masked_identity_is_the_input_of_its_module(decompose):
    model = decompose(Net(), {"head": 5}, identity_modules={"head": 2})
    x, cache = torch.randn(7, 4), Cache()
    info = MaskInfo(torch.rand(7, 2), torch.rand(7), None)
    hidden = model.target.mlp(x)
    eye = nn.Linear(3, 3, bias=False)
    eye.weight.data = torch.eye(3)
    wanted = masked_linear(eye, model.components["head.pre_identity"], hidden, info)
    out = model.run_masked(x, {"head.pre_identity": info}, cache).detach()
    np.testing.assert_allclose(cache.inputs["head.pre_identity"], hidden)
    np.testing.assert_allclose(cache.inputs["head"].detach(), wanted, atol=1e-5)
    head = model.target.head
    wanted = wanted @ head.weight.numpy().T + head.bias.numpy()
    np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_an_identity_masked_with_zeros_gives_a_zero_input(decompose):
    model = decompose(gpt2(), {"*.c_fc": 5}, "logits", identity_modules={"*.c_fc": 2})
    zeros, cache = MaskInfo(torch.zeros(2, 5, 2), None, None), Cache()
    name = "transformer.h.1.mlp.c_fc"
    model.run_masked(TOKENS, {f"{name}.pre_identity": zeros}, cache)
    assert (cache.inputs[name] == 0).all() and cache.inputs[f"{name}.pre_identity"].abs().sum() > 0


def test_an_identity_takes_a_keyword_and_keeps_its_place_in_a_copy(decompose):
    target = Calls(lambda part, x: part(input=x))
    model = copy.deepcopy(decompose(target, {"part": 5}, identity_modules={"part": 2}))
    zeros = MaskInfo(torch.zeros(3, 2), None, None)
    out = model.run_masked(torch.randn(3, 4), {"part.pre_identity": zeros})
    torch.testing.assert_close(out, target.part.bias.expand(3, 4))


def test_identities_are_inserted_once_however_often_a_target_is_decomposed(decompose):
    target, x = Net(), torch.randn(7, 4)
    for _ in range(2):
        model = decompose(target, {"head": 5}, identity_modules={"head": 2})
    _, inputs = model.run_target(x)
    assert inputs.keys() == {"head", "head.pre_identity"}


def test_an_identity_before_an_embedding_is_refused_by_name(decompose):
    with pytest.raises(ValueError, match="identity_modules: 'embed' is an embedding"):
        decompose(Words(), {"head": 5}, identity_modules={"*": 2})


def test_a_pattern_of_identities_without_a_match_is_an_error(decompose):
    with pytest.raises(ValueError, match="identity_modules: pattern 'tail'"):
        decompose(Net(), {"head": 5}, identity_modules={"tail": 2})


# ------------------------------------------------------------------ precision


def random_masks(model, delta):
    shape = TOKENS.shape
    masks = {}
    for name, c in model.components.items():
        rows = Rows.of(torch.rand(shape) < 0.9)
        n = len(rows.index)
        masks[name] = MaskInfo(torch.rand(n, c.C), torch.rand(n) if delta else None, rows)
    return masks


@pytest.fixture
def words(decompose):
    return decompose(random_weights(Words()), {"*": 5}, identity_modules={"head": 3})


@pytest.mark.parametrize("delta", [True, False])
def test_autocast_is_close_to_float32_and_keeps_the_targets_types(delta, words):
    masks, cache = random_masks(words, delta), Cache()
    exact = words.run_masked(TOKENS, masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        target_out, inputs = words.run_target(TOKENS)
        out = words.run_masked(TOKENS, masks)
        words.run_masked(TOKENS, masks_of_ones(words, inputs), cache)
    torch.testing.assert_close(out.float(), exact, atol=0.03, rtol=0.03)
    assert out.dtype == target_out.dtype == torch.bfloat16
    assert {n: x.dtype for n, x in cache.inputs.items()} == {n: x.dtype for n, x in inputs.items()}


@pytest.mark.parametrize("delta", [True, False])
def test_a_target_in_half_precision_keeps_its_type(delta, words):
    masks = random_masks(words, delta)
    exact, cache = words.run_masked(TOKENS, masks), Cache()
    words.target.bfloat16()
    out = words.run_masked(TOKENS, masks)
    words.run_masked(TOKENS, masks_of_ones(words, words.run_target(TOKENS)[1]), cache)
    assert out.dtype == cache.inputs["head"].dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=0.03, rtol=0.03)


def test_a_target_in_double_precision_runs_under_autocast(words):
    masks = random_masks(words, True)
    exact = words.run_masked(TOKENS, masks)
    words.target.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = words.run_masked(TOKENS, masks)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), exact, atol=0.03, rtol=0.03)


def test_all_ones_with_delta_is_a_target_in_half_precision_to_the_last_bit(words):
    words.target.bfloat16()
    out, inputs = words.run_target(TOKENS)
    assert torch.equal(words.run_masked(TOKENS, masks_of_ones(words, inputs)), out)


def test_a_pattern_without_a_number_is_left_out(make_config):
    target = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    assert expand_patterns(target, {"0": None, "[01]": 5}, "decompose.modules") == {"0": 5, "1": 5}
    nothing = make_config().decompose.model_copy(update={"modules": {"0": None}, "tied": []})
    with pytest.raises(ValueError, match="no pattern has a number"):
        ComponentModel(target, nothing, seed=0)
