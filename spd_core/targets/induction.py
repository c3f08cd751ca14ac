"""Attention-only transformer that learns induction: predict what followed the cue before."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from spd_core.data.induction import induction_sequences
from spd_core.randomness import StepRandomness, stream
from spd_core.targets.config import InductionDataConfig, InductionTargetConfig
from spd_core.targets.fit import fit

CPU = torch.device("cpu")


class Attention(nn.Module):
    """Causal attention with one linear map each for queries, keys, values and output."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(d_model, d_model) for _ in range(4)
        )

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        q, k, v = (
            proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.attn = Attention(d_model, n_heads)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        return x + self.attn(x)


class InductionTransformer(nn.Module):
    """Tokens to the logits of the token after the last one; no layer norm and no MLP."""

    def __init__(
        self, config: InductionTargetConfig, data: InductionDataConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        n_tokens = data.vocab_size + 1
        self.wte = nn.Embedding(n_tokens, config.d_model)
        self.wpe = nn.Embedding(data.seq_len, config.d_model)
        self.blocks = nn.ModuleList(
            Block(config.d_model, config.n_heads) for _ in range(config.n_layers)
        )
        self.lm_head = nn.Linear(config.d_model, n_tokens, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.zero_()
                else:
                    std = 1 / math.sqrt(config.d_model)
                    parameter.normal_(0, std, generator=generator)

    def forward(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch n_tokens"]:
        x = self.wte(tokens) + self.wpe.weight
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x[:, -1])


def train_induction(
    config: InductionTargetConfig, data: InductionDataConfig, seed: int
) -> tuple[InductionTransformer, float]:
    """Train until `accuracy` is reached; returns the model and its last losses' mean in nats."""
    model = InductionTransformer(config, data, stream(seed, "target_init", device=CPU))

    def loss_at(step: int) -> Float[Tensor, ""]:
        randomness = StepRandomness(seed, step, 0, 1, config.batch_size, CPU)
        tokens = induction_sequences(data, randomness.batch_stream("target_data"))
        return F.cross_entropy(model(tokens[:, :-1]), tokens[:, -1])

    def solved() -> bool:
        return induction_problem(model, config, data) is None

    return model, fit(config, list(model.parameters()), loss_at, solved)


@torch.no_grad()
def induction_problem(
    model: InductionTransformer, config: InductionTargetConfig, data: InductionDataConfig
) -> str | None:
    """What makes it a bad target: too few right answers on 4,096 fresh sequences."""
    randomness = StepRandomness(0, 0, 0, 1, 4096, CPU, phase="eval")
    tokens = induction_sequences(data, randomness.batch_stream("target_data"))
    accuracy = (model(tokens[:, :-1]).argmax(-1) == tokens[:, -1]).float().mean().item()
    wanted = config.accuracy
    return None if accuracy >= wanted else f"has accuracy {accuracy:.3f}, less than {wanted}"
