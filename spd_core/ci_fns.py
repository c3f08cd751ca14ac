"""Causal-importance functions and the sigmoids that bring their output to [0, 1]."""

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from spd_core.components import LinearComponents
from spd_core.config import AnyCiFnConfig, CiFnConfig, CustomCiFnConfig, Sigmoid
from spd_core.fast import mlps, native
from spd_core.fast.fused import fused
from spd_core.parts import load_part

LEAK = 0.01


@dataclass(frozen=True)
class CausalImportance:
    """One module's causal importances: `lower` is for masks, `upper` for the minimality loss."""

    lower: Float[Tensor, "... C"]
    pre_sigmoid: Float[Tensor, "... C"]  # may be of half precision
    sigmoid: Sigmoid

    @property
    def upper(self) -> Float[Tensor, "... C"]:
        """Made from `pre_sigmoid` at every call: an array of that size is not kept."""
        return _value(self.sigmoid, upper_leaky_hard, self.pre_sigmoid, None)


class _LowerLeakyHard(torch.autograd.Function):
    """clamp(x, 0, 1); below 0 the gradient leaks, but only where descent would raise x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,), (grad,) = ctx.saved_tensors, grad_outputs
        return torch.where(x <= 0, LEAK * grad.clamp(max=0), grad * (x <= 1))


def lower_leaky_hard(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return cast(Tensor, _LowerLeakyHard.apply(x))


def upper_leaky_hard(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """clamp(x, 0, 1) up to 1, then rising with slope 0.01."""
    return torch.where(x > 1, 1 + LEAK * (x - 1), x.clamp(0, 1))


def _value(sigmoid: Sigmoid, leaky_hard: Any, g: Tensor, noise: Tensor | None) -> Tensor:
    # Under autocast too, masks and powers need the precision.
    x = g.to(torch.promote_types(g.dtype, torch.float32))
    x = x if noise is None else 1.05 * x - 0.05 * noise
    match sigmoid:
        case "leaky_hard":
            return leaky_hard(x)
        case "normal":
            return torch.sigmoid(x)
        case "hard":
            return x.clamp(0, 1)
        case "swish_hard":
            return (x * torch.sigmoid(10 * x)).clamp(0, 1)


def apply_sigmoid(
    pre_sigmoid: Float[Tensor, "... C"],
    sigmoid: Sigmoid,
    binomial_noise: Float[Tensor, "... C"] | None,
) -> CausalImportance:
    """The pair of values; under binomial sampling `lower` sees 1.05 g - 0.05 u, u ~ U(0, 1)."""
    if sigmoid == "leaky_hard" and binomial_noise is None and native.is_native(pre_sigmoid):
        lower = native.lower_leaky_hard(pre_sigmoid)
    else:
        value = fused(_value, pre_sigmoid.device)
        lower = value(sigmoid, lower_leaky_hard, pre_sigmoid, binomial_noise)
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
