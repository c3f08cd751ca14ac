"""Causal-importance functions and the sigmoids that bring their output to [0, 1]."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from spd_core.components import LinearComponents
from spd_core.config import AnyCiFnConfig, CiFnConfig, CustomCiFnConfig, Sigmoid
from spd_core.fast import mlps, native
from spd_core.fast.fused import fused
from spd_core.fast.leaky_hard import lower_leaky_hard, upper_leaky_hard
from spd_core.parts import load_part
from spd_core.precision import at_least_float32


@dataclass(frozen=True)
class CausalImportance:
    """One module's causal importances: `lower` is for masks, `upper` for the minimality loss."""

    lower: Float[Tensor, "... C"]
    pre_sigmoid: Float[Tensor, "... C"]  # may be of half precision
    sigmoid: Sigmoid

    @property
    def upper(self) -> Float[Tensor, "... C"]:
        """Made from `pre_sigmoid` at every call: an array of that size is not kept."""
        g, sigmoid = self.pre_sigmoid, self.sigmoid
        return upper_leaky_hard(g) if sigmoid == "leaky_hard" else _shared_value(sigmoid, g)


def _shared_value(sigmoid: Literal["normal", "hard", "swish_hard"], g: Tensor) -> Tensor:
    """The one value that `lower` and `upper` share."""
    x = at_least_float32(g)
    match sigmoid:
        case "normal":
            return torch.sigmoid(x)
        case "hard":
            return x.clamp(0, 1)
        case "swish_hard":
            return (x * torch.sigmoid(10 * x)).clamp(0, 1)


def _jittered(g: Tensor, noise: Tensor) -> Tensor:
    return 1.05 * at_least_float32(g) - 0.05 * noise


def apply_sigmoid(
    pre_sigmoid: Float[Tensor, "... C"],
    sigmoid: Sigmoid,
    binomial_noise: Float[Tensor, "... C"] | None,
) -> CausalImportance:
    """The pair of values; under binomial sampling `lower` sees 1.05 g - 0.05 u, u ~ U(0, 1)."""
    x, device = pre_sigmoid, pre_sigmoid.device
    if binomial_noise is not None:
        x = fused(_jittered, device)(x, binomial_noise)
    lower = (
        lower_leaky_hard(x) if sigmoid == "leaky_hard" else fused(_shared_value, device)(sigmoid, x)
    )
    return CausalImportance(lower, pre_sigmoid, sigmoid)


class CiFn(nn.Module):
    """The causal-importance function of one module: pre-sigmoid values from its input.

    `mlp` and `vector_mlp` are C small MLPs d_in -> hidden (GELU) -> 1 side by side, laid out as
    (C, width, batch): a layer is one batched matmul, and elementwise work runs along contiguous
    memory. `shared_mlp` is a single one d_in -> hidden (GELU) -> C.
    """

    def __init__(self, config: CiFnConfig, C: int, d_in: int, generator: torch.Generator) -> None:
        super().__init__()
        self.kind: Literal["mlp", "vector_mlp", "shared_mlp"] = config.kind
        n_mlps, n_out = (1, C) if config.kind == "shared_mlp" else (C, 1)
        widths = [1 if config.kind == "mlp" else d_in, *config.hidden, n_out]
        gains = [math.sqrt(2)] * len(config.hidden) + [1.0]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b, gain in zip(widths[:-1], widths[1:], gains, strict=True):
            normal = torch.randn(n_mlps, b, a, generator=generator)
            self.weights.append(nn.Parameter(normal * (gain / a**0.5)))
            self.biases.append(nn.Parameter(torch.zeros(n_mlps, b, 1)))

    def forward(
        self, x: Float[Tensor, "... d_in"], inner_acts: Float[Tensor, "... C"] | None
    ) -> Float[Tensor, "... C"]:
        """`inner_acts` are x V; only `mlp` looks at them, and it does not look at x."""
        *inner, (last_weight, last_bias) = zip(self.weights, self.biases, strict=True)
        match self.kind:
            case "mlp":
                assert inner_acts is not None
                *positions, C = inner_acts.shape
                x = inner_acts.reshape(-1, C)
                if len(inner) == 1 and (x.is_cuda or native.has_loops(x.device, last_weight.dtype)):
                    loop = mlps.scalar_mlps if x.is_cuda else native.scalar_mlps
                    return loop(x, *inner[0], last_weight, last_bias).view(inner_acts.shape)
                h = x.T.unsqueeze(1)
            case "vector_mlp":
                *positions, d_in = x.shape
                h = x.reshape(-1, d_in).T.expand(len(self.weights[0]), -1, -1)
            case "shared_mlp":
                for weight, bias in inner:
                    x = F.gelu(F.linear(x, weight[0], bias[0, :, 0]))
                return F.linear(x, last_weight[0], last_bias[0, :, 0])
        for weight, bias in inner:
            h = F.gelu(torch.baddbmm(bias, weight, h))
        g = torch.baddbmm(last_bias, last_weight, h).flatten(0, 1)
        return g.T.reshape(*positions, len(g))


def make_ci_fn(
    path: str, config: AnyCiFnConfig, components: LinearComponents, generator: torch.Generator
) -> nn.Module:
    """The causal-importance function of one module."""
    d_in, C = components.V.shape
    if isinstance(config, CustomCiFnConfig):
        return load_part("decompose.ci_fn", config, "ci_fn")(C, d_in, generator)
    if components.takes_tokens and config.kind != "mlp":
        raise ValueError(
            f"decompose.ci_fn.kind={config.kind}: {path!r} is an embedding, whose input is no "
            "vector; use kind=mlp, or leave it out of decompose.modules"
        )
    return CiFn(config, C, d_in, generator)
