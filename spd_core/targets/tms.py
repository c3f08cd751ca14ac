"""Toy model of superposition: x_hat = ReLU(W2 [H] W1 x + b) with W2 = W1^T and H = identity."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_core.data.sparse import sparse_features
from spd_core.randomness import StepRandomness, stream
from spd_core.targets.config import SparseFeatureDataConfig, TMSTargetConfig
from spd_core.targets.fit import fit

CPU = torch.device("cpu")


class TMS(nn.Module):
    """`linear1` (n_hidden, n_features) without bias, `linear2` its transpose with a bias.

    Between them the identities `hidden_layers.0`, `hidden_layers.1`, ..., which never train.
    """

    def __init__(self, config: TMSTargetConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.n_features = config.n_features
        self.linear1 = nn.Linear(config.n_features, config.n_hidden, bias=False)
        self.hidden_layers = nn.ModuleList(
            nn.Linear(config.n_hidden, config.n_hidden, bias=False)
            for _ in range(config.n_hidden_layers)
        )
        self.linear2 = nn.Linear(config.n_hidden, config.n_features)
        with torch.no_grad():
            # torch's own linear initialisation, from an explicit stream.
            bound1, bound2 = config.n_features**-0.5, config.n_hidden**-0.5
            self.linear1.weight.uniform_(-bound1, bound1, generator=generator)
            self.linear2.bias.uniform_(-bound2, bound2, generator=generator)
            if config.init_bias_to_zero:
                self.linear2.bias.zero_()
            for layer in self.hidden_layers:
                layer.get_parameter("weight").copy_(torch.eye(config.n_hidden))
            self.copy_tied_weight()

    @torch.no_grad()
    def copy_tied_weight(self) -> None:
        self.linear2.weight.copy_(self.linear1.weight.T)

    def forward(self, x: Float[Tensor, "batch n_features"]) -> Float[Tensor, "batch n_features"]:
        hidden = self.linear1(x)
        for layer in self.hidden_layers:
            hidden = layer(hidden)
        return self.linear2(hidden).relu()


def train_tms(
    config: TMSTargetConfig, data: SparseFeatureDataConfig, seed: int
) -> tuple[TMS, float]:
    """Train on the mean squared error; returns the model and its last losses' mean."""
    model = TMS(config, stream(seed, "target_init", device=CPU))
    # The transpose of one weight serves both layers while training; linear2's copy follows.
    weight, bias = model.linear1.weight, model.linear2.bias

    def loss_at(step: int) -> Float[Tensor, ""]:
        randomness = StepRandomness(seed, step, 0, 1, config.batch_size, CPU)
        x = sparse_features(data, config.n_features, randomness.batch_stream("target_data"))
        return ((x @ weight.T @ weight + bias).relu() - x).square().mean()

    loss = fit(config, [weight, bias], loss_at)
    model.copy_tied_weight()
    return model, loss


@torch.no_grad()
def tms_problem(model: TMS) -> str | None:
    """What makes it a bad target: a single feature at 1 must come out above 1/2; NaN does not."""
    out = model(torch.eye(model.n_features))
    missing = [i for i in range(model.n_features) if not out[i, i] >= 0.5]
    return f"does not represent features {missing}" if missing else None
