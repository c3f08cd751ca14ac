import re

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from spd_core.component_model import ComponentModel, MaskInfo
from spd_core.targets.config import TransformerTargetConfig
from spd_core.targets.transformer import RoPE, SwiGLU, build, make_norm, sample

KINDS = ("llama_simple", "llama_simple_mlp", "gpt2_simple", "gpt2_simple_noln")
VOCAB, SEQ = 50, 12


def make_target_config(**overrides):
    kind = overrides.get("kind", "llama_simple")
    values = {
        "kind": kind,
        "d_model": 16,
        "d_mlp": 24,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2 if kind.startswith("llama") else 4,
        "batch_size": 8,
        "steps": 10,
        "lr": {"kind": "constant", "start": 1e-3, "end": 1e-3, "warmup_fraction": 0.0},
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "autocast": "off",
        "seed": 0,
        "n_seeds": 1,
        "from_run": None,
    }
    return TransformerTargetConfig.model_validate(values | overrides)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(**overrides):
    return build(make_target_config(**overrides), VOCAB, SEQ, seeded())


def lively(**overrides):
    """Weights so large that attention looks somewhere, and logits are of order one."""
    model = make(**overrides)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=seeded())
    return model


def some_tokens(n=3, seq=SEQ):
    return torch.randint(0, VOCAB, (n, seq), generator=seeded(1))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_depend_on_the_past_alone(kind):
    model, tokens = lively(kind=kind), some_tokens()
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    logits, others = model(tokens), model(changed)
    assert logits.shape == (3, SEQ, VOCAB)
    assert torch.equal(logits[:, :7], others[:, :7])
    assert ((logits[:, 7:] - others[:, 7:]).abs().amax((0, 2)) > 1e-3).all()
    torch.testing.assert_close(model(tokens[:, :5]), logits[:, :5])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_depend_on_the_order_of_the_past(kind):
    model, tokens = lively(kind=kind, n_layers=1), some_tokens()
    swapped = tokens.clone()
    swapped[:, [2, 4]] = tokens[:, [4, 2]]
    assert (model(tokens)[:, -1] - model(swapped)[:, -1]).abs().max() > 1e-3


def test_llama_simple_is_the_llama_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    model, tokens = lively(), some_tokens()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
    options = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": SEQ}
    other = LlamaForCausalLM(LlamaConfig(**sizes, **options))
    theirs = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
    theirs |= {"wte": "model.embed_tokens", "norm_f": "model.norm", "h.": "model.layers."}
    theirs |= {".attn.": ".self_attn."}
    other.load_state_dict(renamed(model.state_dict(), theirs))
    torch.testing.assert_close(other(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)


def test_gpt2_simple_is_the_gpt2_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    model, tokens = lively(kind="gpt2_simple"), some_tokens()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    sizes = {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}
    other = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=SEQ)).eval()
    weights = model.state_dict()
    for name in [n for n in weights if "q_proj" in n]:
        qkv = [weights.pop(name.replace("q_proj", f"{n}_proj")) for n in "qkv"]
        weights[name.replace("q_proj", "c_attn")] = torch.cat(qkv)
    # Their Conv1D has the transpose of a linear layer's weight.
    inside = {n for n, w in weights.items() if w.dim() == 2 and ("attn." in n or "mlp." in n)}
    weights = {n: w.T if n in inside else w for n, w in weights.items()}
    theirs = {"o_proj": "c_proj", "down_proj": "c_proj", "norm_": "ln_", "h.": "transformer.h."}
    theirs |= {"wte": "transformer.wte", "wpe": "transformer.wpe", "norm_f": "transformer.ln_f"}
    other.load_state_dict(renamed(weights, theirs))
    torch.testing.assert_close(other(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)


def renamed(weights, theirs):
    """Every part of a name that stands in `theirs` is replaced; the longest first."""
    pattern = "|".join(re.escape(part) for part in sorted(theirs, key=len, reverse=True))
    return {re.sub(pattern, lambda m: theirs[m[0]], name): w for name, w in weights.items()}


def test_shared_key_value_heads_equal_repeated_ones():
    grouped, repeated = lively(n_kv_heads=2), lively(n_kv_heads=4)
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = weight.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    repeated.load_state_dict(weights)
    torch.testing.assert_close(grouped(some_tokens()), repeated(some_tokens()))


def test_rope_turns_complex_numbers():
    x = torch.randn(2, 3, SEQ, 8)
    numbers = x[..., :4].numpy() + 1j * x[..., 4:].numpy()
    t, i = np.arange(SEQ)[:, None], np.arange(4)
    turned = numbers * np.exp(1j * t * 10_000.0 ** (-2 * i / 8))
    wanted = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(RoPE(8, 20)(x), wanted, atol=1e-5)


def test_rms_norm():
    x, norm = torch.randn(4, 16) * 3, make_norm(make_target_config())
    assert isinstance(norm, nn.RMSNorm)
    norm.weight.data = torch.rand(16)
    wanted = x.numpy() / np.sqrt((x.numpy() ** 2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(x).detach(), wanted * norm.weight.detach().numpy(), atol=1e-5)


def test_swiglu():
    mlp, x = SwiGLU(make_target_config()), torch.randn(5, 16)
    one, two, three = (p.detach().numpy() for p in mlp.parameters())
    y = x.numpy() @ one.T
    wanted = (y / (1 + np.exp(-y)) * (x.numpy() @ two.T)) @ three.T
    np.testing.assert_allclose(mlp(x).detach(), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_module_paths(kind):
    swiglu = ["gate_proj", "up_proj", "down_proj"]
    names = [f"attn.{n}_proj" for n in "qkvo"]
    names += [f"mlp.{n}" for n in (swiglu if kind == "llama_simple" else ["c_fc", "down_proj"])]
    found = {n: m for n, m in make(kind=kind).named_modules() if isinstance(m, nn.Linear)}
    assert [*found] == [*(f"h.{i}.{name}" for i in range(2) for name in names), "lm_head"]
    has_bias = {m.bias is not None for n, m in found.items() if n != "lm_head"}
    assert has_bias == {kind.startswith("gpt2")}


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights(kind):
    model = make(kind=kind, d_model=128, d_mlp=256, n_layers=3)
    assert model.lm_head.weight is model.wte.weight
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all()
            continue
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert parameter.std().item() == pytest.approx(0.02 / 6**0.5 if writes else 0.02, rel=0.06)
        assert parameter.mean().abs() < 0.002


def test_initial_weights_depend_on_the_generator_alone():
    config = make_target_config()
    first = build(config, VOCAB, SEQ, seeded()).state_dict()
    torch.manual_seed(1)
    again = build(config, VOCAB, SEQ, seeded()).state_dict()
    other = build(config, VOCAB, SEQ, seeded(1)).state_dict()
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["wte.weight"], other["wte.weight"])


def test_the_simple_stories_model_has_its_published_size():
    sizes = {"d_model": 128, "d_mlp": 341, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2}
    model = build(make_target_config(**sizes), 4019, 512, seeded())
    # attention 128 (128 + 64 + 64 + 128) = 49,152; MLP 3 * 128 * 341 = 130,944; norms 2 * 128
    blocks = 4 * (49_152 + 130_944 + 256)
    assert blocks == 721_408 and 4019 * 128 == 514_432
    assert sum(p.numel() for p in model.parameters()) == 721_408 + 128 + 514_432 == 1_235_968


@pytest.mark.parametrize("kind", KINDS)
def test_components_reproduce_the_logits(kind, make_config):
    target, tokens = lively(kind=kind), some_tokens()
    wanted = target(tokens).detach()
    modules = {"h.*": 7, "wte": 5, "lm_head": 6}
    config = make_config().decompose.model_copy(update={"modules": modules, "tied": []})
    model = ComponentModel(target, config, 0)
    assert len(model.components) == 2 * (7 if kind == "llama_simple" else 6) + 2
    logits, inputs = model.run_target(tokens)
    torch.testing.assert_close(logits, wanted)
    at, ones = (3, SEQ), torch.ones(3, SEQ)
    masks = {n: MaskInfo(torch.ones(*at, c.C), ones, None) for n, c in model.components.items()}
    torch.testing.assert_close(model.run_masked(tokens, masks), wanted, atol=1e-5, rtol=1e-5)
    alone = {n: MaskInfo(torch.ones(*at, c.C), None, None) for n, c in model.components.items()}
    assert (model.run_masked(tokens, alone) - wanted).abs().max() > 1e-2
    assert {n: x.shape[:2] for n, x in inputs.items()} == dict.fromkeys(masks, at)


def test_samples_continue_the_prompt_within_the_context():
    model, prompt = lively(), some_tokens()[0, :3]
    first = sample(model, prompt, 5, 1.0, seeded())
    assert torch.equal(first[:3], prompt) and len(first) == 8
    assert torch.equal(first, sample(model, prompt, 5, 1.0, seeded()))
    assert len(sample(model, prompt, 100, 1.0, seeded())) == SEQ
    greedy = sample(model, prompt, 1, 1e-6, seeded())
    assert greedy[3] == model(prompt[None])[0, -1].argmax()


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match=r"13 tokens.*seq_len"):
        make()(some_tokens(seq=SEQ + 1))


@pytest.mark.parametrize(
    "wrong",
    [{"d_model": 18}, {"n_kv_heads": 3}, {"kind": "gpt2_simple", "n_kv_heads": 2}, {"d_model": 12}],
)
def test_heads_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValidationError, match="n_heads"):
        make_target_config(**wrong)
