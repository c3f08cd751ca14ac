"""Toy model of superposition: x_hat = ReLU(W2 W1 x + b) with W2 = W1^T."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_core.config import TMSTargetConfig


class TMS(nn.Module):
    """`linear1` (n_hidden, n_features) without bias, `linear2` its transpose with a bias."""

    def __init__(self, config: TMSTargetConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.n_features = config.n_features
        self.linear1 = nn.Linear(config.n_features, config.n_hidden, bias=False)
        self.linear2 = nn.Linear(config.n_hidden, config.n_features)
        with torch.no_grad():
            # torch's own linear initialisation, from an explicit stream.
            bound1, bound2 = config.n_features**-0.5, config.n_hidden**-0.5
            self.linear1.weight.uniform_(-bound1, bound1, generator=generator)
            self.linear2.bias.uniform_(-bound2, bound2, generator=generator)
            if config.init_bias_to_zero:
                self.linear2.bias.zero_()
            self.copy_tied_weight()

    @torch.no_grad()
    def copy_tied_weight(self) -> None:
        self.linear2.weight.copy_(self.linear1.weight.T)

    def forward(self, x: Float[Tensor, "batch n_features"]) -> Float[Tensor, "batch n_features"]:
        return self.linear2(self.linear1(x)).relu()
