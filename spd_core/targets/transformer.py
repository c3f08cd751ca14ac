"""Four small language models that differ in norm, positions and MLP, and share all the rest.

                  norm       positions   MLP                             biases
llama_simple      RMSNorm    RoPE        SwiGLU gate_proj up_proj down_proj  no
llama_simple_mlp  RMSNorm    RoPE        GELU   c_fc down_proj               no
gpt2_simple       LayerNorm  learned     GELU   c_fc down_proj               yes
gpt2_simple_noln  none       learned     GELU   c_fc down_proj               yes

`lm_head` has the weight of `wte` in all four, as in GPT-2 and the SimpleStories models (whose
"1.25M" counts it once). Llamas may share one key-value head among several query heads.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from spd_core.targets.config import TransformerTargetConfig

INIT_STD = 0.02
ROPE_BASE = 10_000.0
NORM_EPS = 1e-5


def build(
    config: TransformerTargetConfig, vocab_size: int, seq_len: int, generator: torch.Generator
) -> "Transformer":
    """An untrained model on the CPU, for up to `seq_len` tokens.

    Weights come from the generator, as in GPT-2: N(0, 0.02), divided by sqrt(2 n_layers) where they
    write to the residual stream; biases are 0.
    """
    model = Transformer(config, vocab_size, seq_len)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = INIT_STD * (2 * config.n_layers) ** -0.5 if writes else INIT_STD
            nn.init.normal_(parameter, std=std, generator=generator)
    return model


class Transformer(nn.Module):
    def __init__(self, config: TransformerTargetConfig, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.wte = nn.Embedding(vocab_size, config.d_model)
        self.wpe = None if is_llama(config) else nn.Embedding(seq_len, config.d_model)
        self.h = nn.ModuleList(Block(config, seq_len) for _ in range(config.n_layers))
        self.norm_f = make_norm(config)
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        seq = tokens.shape[1]
        if seq > self.seq_len:
            raise ValueError(
                f"{seq} tokens, but this model was built for data.seq_len={self.seq_len}"
            )
        x = self.wte(tokens)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(seq, device=tokens.device)[None])
        for block in self.h:
            x = block(x)
        return self.lm_head(self.norm_f(x))


class Block(nn.Module):
    def __init__(self, config: TransformerTargetConfig, seq_len: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = make_norm(config), make_norm(config)
        self.attn = Attention(config, seq_len)
        self.mlp = SwiGLU(config) if config.kind == "llama_simple" else GELUMLP(config)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Attention(nn.Module):
    """Causal attention; query head i reads key-value head i // (n_heads / n_kv_heads)."""

    def __init__(self, config: TransformerTargetConfig, seq_len: int) -> None:
        super().__init__()
        d, bias = config.d_model, not is_llama(config)
        self.n_heads, self.d_head = config.n_heads, d // config.n_heads
        d_kv = config.n_kv_heads * self.d_head
        self.q_proj = nn.Linear(d, d, bias=bias)
        self.k_proj = nn.Linear(d, d_kv, bias=bias)
        self.v_proj = nn.Linear(d, d_kv, bias=bias)
        self.o_proj = nn.Linear(d, d, bias=bias)
        self.rope = RoPE(self.d_head, seq_len) if is_llama(config) else nn.Identity()

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        q = self.rope(self._heads(self.q_proj(x)))
        k = self.rope(self._heads(self.k_proj(x)))
        v = self._heads(self.v_proj(x))
        shared = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Float[Tensor, "batch seq d"]) -> Float[Tensor, "batch heads seq d_head"]:
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)


class RoPE(nn.Module):
    """Turns feature pair (i, i + d_head/2) at position t by the angle t base^(-2i / d_head)."""

    cos: Float[Tensor, "seq_len half"]
    sin: Float[Tensor, "seq_len half"]

    def __init__(self, d_head: int, seq_len: int) -> None:
        super().__init__()
        frequencies = ROPE_BASE ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
        angles = torch.arange(seq_len, dtype=torch.float64).outer(frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(
        self, x: Float[Tensor, "batch heads seq d_head"]
    ) -> Float[Tensor, "batch heads seq d_head"]:
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, config: TransformerTargetConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.down_proj = nn.Linear(config.d_mlp, config.d_model, bias=False)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GELUMLP(nn.Module):
    def __init__(self, config: TransformerTargetConfig) -> None:
        super().__init__()
        bias = not is_llama(config)
        self.c_fc = nn.Linear(config.d_model, config.d_mlp, bias=bias)
        self.down_proj = nn.Linear(config.d_mlp, config.d_model, bias=bias)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        return self.down_proj(F.gelu(self.c_fc(x), approximate="tanh"))


def is_llama(config: TransformerTargetConfig) -> bool:
    return config.kind in ("llama_simple", "llama_simple_mlp")


def make_norm(config: TransformerTargetConfig) -> nn.Module:
    if config.kind == "gpt2_simple_noln":
        return nn.Identity()
    return (nn.RMSNorm if is_llama(config) else nn.LayerNorm)(config.d_model, eps=NORM_EPS)


@torch.no_grad()
def sample(
    model: Transformer,
    prompt: Int[Tensor, "n_prompt"],
    n_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> Int[Tensor, "n"]:
    """The prompt and `n_tokens` more, or as many as fit into the model's context."""
    tokens = prompt
    for _ in range(min(n_tokens, model.seq_len - len(prompt))):
        probabilities = (model(tokens[None])[0, -1].float() / temperature).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)])
    return tokens
