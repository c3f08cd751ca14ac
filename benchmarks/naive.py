"""One optimisation step as the formulas stand, in eager PyTorch: the yardstick of every ratio.

Nothing is shared between losses but the target's output and the causal importances, nothing is
left out, and W - (V U)^T is a matrix of its own. Random numbers are the core's, so that losses and
gradients must be equal.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from spd_core.ci_fns import CiFn
from spd_core.component_model import ComponentModel
from spd_core.config import RunConfig
from spd_core.config.losses import ImportanceMinimalityConfig, PGDReconConfig
from spd_core.data.batches import draw_examples
from spd_core.fast.leaky_hard import LEAK
from spd_core.randomness import StepRandomness
from spd_core.schedule import annealed_p, schedule_value

Values = dict[str, Float[Tensor, "..."]]
Routes = dict[str, Bool[Tensor, "..."] | None]


class LowerLeakyHard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,), (grad,) = ctx.saved_tensors, grad_outputs
        leaked = torch.where(grad < 0, LEAK * grad, torch.zeros_like(grad))
        return torch.where(x <= 0, leaked, torch.where(x <= 1, grad, torch.zeros_like(grad)))


def upper_leaky_hard(x: Tensor) -> Tensor:
    return torch.where(x > 1, 1 + LEAK * (x - 1), x.clamp(0, 1))


def pre_sigmoid(ci_fn: nn.Module, x: Tensor, inner_acts: Tensor) -> Tensor:
    assert isinstance(ci_fn, CiFn)
    layers = list(zip(ci_fn.weights, ci_fn.biases, strict=True))
    match ci_fn.kind:
        case "mlp":
            h = inner_acts.unsqueeze(-1)
        case "vector_mlp":
            h = x.unsqueeze(-2).expand(*x.shape[:-1], len(layers[0][0]), x.shape[-1])
        case "shared_mlp":
            for i, (weight, bias) in enumerate(layers):
                x = F.linear(x, weight[0], bias[0, :, 0])
                x = F.gelu(x) if i < len(layers) - 1 else x
            return x
    for i, (weight, bias) in enumerate(layers):
        h = torch.einsum("...ci,coi->...co", h, weight) + bias[..., 0]
        h = F.gelu(h) if i < len(layers) - 1 else h
    return h[..., 0]


@contextmanager
def hooked(
    model: ComponentModel, replace: Callable[[str, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call replace(name, input, output) after every decomposed module."""

    def after(name: str, _module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor | None:
        return replace(name, args[0], out)

    handles = [
        model.target.get_submodule(name).register_forward_hook(partial(after, name))
        for name in model.components
    ]
    yield
    for handle in handles:
        handle.remove()


def masked(model: ComponentModel, x: Tensor, masks: Values, deltas: Values, routes: Routes):
    """The output with every routed module on its masked subcomponents and its masked delta."""

    def replace(name: str, x: Tensor, out: Tensor) -> Tensor | None:
        if name not in routes:
            return None
        parts = model.components[name]
        delta = parts.weight - (parts.V @ parts.U).T
        y = ((x @ parts.V) * masks[name]) @ parts.U
        y = y + deltas[name].unsqueeze(-1) * (x @ delta.T)
        bias = getattr(model.target.get_submodule(name), "bias", None)
        y = y if bias is None else y + bias
        route = routes[name]
        return y if route is None else torch.where(route.unsqueeze(-1), y, out)

    with hooked(model, replace):
        return model.target(x)


def distance(kind: str, pred: Tensor, target: Tensor) -> Tensor:
    if kind == "mse":
        return ((pred - target) ** 2).mean()
    difference = target.log_softmax(-1) - pred.log_softmax(-1)
    return (target.softmax(-1) * difference).sum(-1).mean()


def losses(
    config: RunConfig, model: ComponentModel, data: Path, step: int
) -> dict[str, Float[Tensor, ""]]:
    """Every loss of the config on the batch of this step.

    Raises:
        NotImplementedError: a loss that no benchmark needs.
    """
    batch_size, device = config.train.batch_size, next(model.parameters()).device
    randomness = StepRandomness(config.seed, step, 0, 1, batch_size, device)
    x, inputs = draw_examples(config, data, randomness, "train"), dict[str, Tensor]()
    with torch.no_grad(), hooked(model, lambda name, x, _out: inputs.update({name: x})):
        target_out = model.target(x)
    g = {n: pre_sigmoid(model.ci_fns[n], v, v @ model.components[n].V) for n, v in inputs.items()}
    lower: Values = {name: LowerLeakyHard.apply(v) for name, v in g.items()}  # pyright: ignore
    upper = {name: upper_leaky_hard(v) for name, v in g.items()}
    shape = next(iter(g.values())).shape[1:-1]

    def from_sources(sources: Values, ci: Values, routes: Routes) -> Tensor:
        masks = {n: ci[n] + (1 - ci[n]) * sources[n][..., :-1] for n in routes}
        deltas = {n: sources[n][..., -1].expand(len(x), *shape) for n in routes}
        kind = config.decompose.distance
        return distance(kind, masked(model, x, masks, deltas, routes), target_out)

    def stochastic(purpose: str, routes: Routes) -> Tensor:
        stream = randomness.batch_stream(purpose)
        sources = {n: stream.uniform(*shape, g[n].shape[-1] + 1) for n in routes}
        return from_sources(sources, lower, routes)

    def k_subset(purpose: str) -> Routes:
        stream = randomness.batch_stream(purpose)
        k = stream.integers(1, len(g) + 1, *shape)
        rank = stream.uniform(*shape, len(g)).argsort(dim=-1).argsort(dim=-1)
        return {name: rank[..., i] < k for i, name in enumerate(g)}

    everywhere: Routes = dict.fromkeys(g)
    first, found = next(iter(g)), {}
    for name, loss in config.losses.configured().items():
        match name:
            case "importance_minimality":
                assert isinstance(loss, ImportanceMinimalityConfig)
                p, n = annealed_p(loss, step / config.train.steps), g[first][..., 0].numel()
                s = [((v + 1e-12) ** p).flatten(0, -2).mean(0) for v in upper.values()]
                beta = [loss.beta * v * torch.log2(1 + n * v) for v in s]
                found[name] = sum(v.sum() for v in [*s, *beta])
            case "faithfulness":
                errors = [c.weight - (c.V @ c.U).T for c in model.components.values()]
                found[name] = torch.cat([error.flatten() for error in errors]).square().mean()
            case "stochastic_recon":
                found[name] = stochastic(f"{name}:0:{first}", everywhere)
            case "stochastic_recon_layerwise":
                each = [stochastic(f"{name}:0:{n}", {n: None}) for n in g]
                found[name] = torch.stack(each).mean()
            case "stochastic_recon_subset":
                routes = k_subset(f"{name}:route:0")
                found[name] = stochastic(f"{name}:0:{first}", routes)
            case "pgd_recon_subset":
                assert isinstance(loss, PGDReconConfig) and loss.scope == "shared_across_batch"
                stream, ones = randomness.shared_stream(f"{name}:sources"), (1,) * len(shape)
                sources = {n: stream.uniform(*ones, v.shape[-1] + 1) for n, v in g.items()}
                routes = k_subset(f"{name}:route")
                ci = {n: v.detach() for n, v in lower.items()}
                for _ in range(loss.n_steps):
                    leaves = [v.requires_grad_() for v in sources.values()]
                    grads = torch.autograd.grad(from_sources(sources, ci, routes), leaves)
                    moved = [(v + loss.step_size * grad.sign()).clamp(0, 1).detach()
                             for v, grad in zip(leaves, grads, strict=True)]  # fmt: skip
                    sources = dict(zip(sources, moved, strict=True))
                found[name] = from_sources(sources, lower, routes)
            case _:
                raise NotImplementedError(f"losses.{name} has no naive form")
    return found


def naive_step(
    config: RunConfig,
    model: ComponentModel,
    data: Path,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    optimizer.zero_grad()
    bf16 = config.train.autocast == "bf16"
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=bf16):
        terms = losses(config, model, data, step)
    options, steps = config.losses.configured(), config.train.steps
    weighted = [schedule_value(options[n].coeff, step, steps) * v for n, v in terms.items()]
    torch.stack(weighted).sum().backward()
    optimizer.step()
