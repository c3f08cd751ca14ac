"""Toy residual MLP: features embedded at random, MLPs that compute ReLU, a read-out."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_core.data.sparse import sparse_features
from spd_core.randomness import StepRandomness, stream
from spd_core.targets.config import ResidMLPTargetConfig, SparseFeatureDataConfig
from spd_core.targets.fit import fit

CPU = torch.device("cpu")


class MLP(nn.Module):
    """`mlp_out(relu(mlp_in(x)))`, without biases."""

    def __init__(self, d_embed: int, d_mlp: int, generator: torch.Generator) -> None:
        super().__init__()
        self.mlp_in = nn.Linear(d_embed, d_mlp, bias=False)
        self.mlp_out = nn.Linear(d_mlp, d_embed, bias=False)
        with torch.no_grad():
            # torch's own linear initialisation, from an explicit stream. From a larger start one
            # layer takes whole features for itself, which the others then do not compute.
            self.mlp_in.weight.uniform_(-(d_embed**-0.5), d_embed**-0.5, generator=generator)
            self.mlp_out.weight.uniform_(-(d_mlp**-0.5), d_mlp**-0.5, generator=generator)

    def forward(self, x: Float[Tensor, "batch d_embed"]) -> Float[Tensor, "batch d_embed"]:
        return self.mlp_out(self.mlp_in(x).relu())


class ResidMLP(nn.Module):
    """out = (x W_E + MLPs) W_E^T, with W_E (n_features, d_embed) fixed and its rows of length 1."""

    W_E: Float[Tensor, "n_features d_embed"]

    def __init__(self, config: ResidMLPTargetConfig, generator: torch.Generator) -> None:
        super().__init__()
        W_E = torch.randn(config.n_features, config.d_embed, generator=generator)
        self.register_buffer("W_E", W_E / W_E.norm(dim=1, keepdim=True))
        self.layers = nn.ModuleList(
            MLP(config.d_embed, config.d_mlp, generator) for _ in range(config.n_layers)
        )

    def forward(self, x: Float[Tensor, "batch n_features"]) -> Float[Tensor, "batch n_features"]:
        residual = x @ self.W_E
        for layer in self.layers:
            residual = residual + layer(residual)
        return residual @ self.W_E.T


def train_resid_mlp(
    config: ResidMLPTargetConfig, data: SparseFeatureDataConfig, seed: int
) -> tuple[ResidMLP, float]:
    """Train to output ReLU(x) + x; returns the model and its last losses' mean."""
    model = ResidMLP(config, stream(seed, "target_init", device=CPU))

    def loss_at(step: int) -> Float[Tensor, ""]:
        randomness = StepRandomness(seed, step, 0, 1, config.batch_size, CPU)
        x = sparse_features(data, config.n_features, randomness.batch_stream("target_data"))
        return (model(x) - x.relu() - x).square().mean()

    return model, fit(config, list(model.parameters()), loss_at)


@torch.no_grad()
def resid_mlp_problem(model: ResidMLP) -> str | None:
    """What makes it a bad target: a feature that no neuron raises above its own residual, 1.

    Or one that some layer leaves to the others: its part of the output is less than a fifth as
    long as that of the layer's median feature.
    """
    residual = model.W_E
    for i, layer in enumerate(model.layers):
        part = layer(residual)
        residual = residual + part
        lengths = (part @ model.W_E.T).norm(dim=1)
        left = torch.nonzero(~(lengths >= lengths.median() / 5)).flatten().tolist()
        if left:
            return f"leaves features {left} to other layers than {i}"
    out = (residual @ model.W_E.T).diagonal()
    missing = [i for i, value in enumerate(out.tolist()) if not value >= 1.25]
    return f"computes no ReLU of features {missing}" if missing else None
