"""Reconstruction losses: a mask source (unmasked, ci, stochastic) times a routing."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from spd_core.ci_fns import CausalImportance
from spd_core.component_model import ComponentModel, MaskInfo
from spd_core.config import StaticProbabilityConfig, UniformKSubsetConfig
from spd_core.losses.distance import LossParts, distance
from spd_core.masks import stochastic_masks
from spd_core.randomness import StepRandomness
from spd_core.routing import Route, route_all, route_static_probability, route_uniform_k_subset

MaskSource = Literal["unmasked", "ci", "stochastic"]


def recon(
    model: ComponentModel,
    batch: Float[Tensor, "batch ..."],
    target_out: Float[Tensor, "batch ..."],
    ci: dict[str, CausalImportance],
    source: MaskSource,
    routing: Literal["all", "layerwise"] | UniformKSubsetConfig | StaticProbabilityConfig,
    randomness: StepRandomness,
    purpose: str,
) -> LossParts:
    """Distance between the target's output and the masked one.

    `stochastic` averages over `n_mask_samples` draws; `layerwise` over the modules, masking one at
    a time. `purpose` names the random streams, so that no two losses share numbers.
    """
    total, count = target_out.new_zeros(()), 0
    n_samples = model.config.n_mask_samples if source == "stochastic" else 1
    for sample in range(n_samples):
        for routes in _routes(list(ci), ci, routing, randomness, f"{purpose}:route:{sample}"):
            part = f"{purpose}:{sample}:{next(iter(routes))}"
            masks = _masks(model, ci, source, routes, randomness, part)
            sum_, n = distance(model.config.distance, model.run_masked(batch, masks), target_out)
            total, count = total + sum_, count + n
    return total, count


def _routes(
    names: list[str],
    ci: dict[str, CausalImportance],
    routing: Literal["all", "layerwise"] | UniformKSubsetConfig | StaticProbabilityConfig,
    randomness: StepRandomness,
    purpose: str,
) -> list[dict[str, Route]]:
    """The forward passes of one sample: which modules are masked, and at which positions."""
    positions = tuple(ci[names[0]].lower.shape[1:-1])
    match routing:
        case "all":
            return [route_all(names)]
        case "layerwise":
            return [route_all([name]) for name in names]
        case UniformKSubsetConfig():
            stream = randomness.batch_stream(purpose)
            return [route_uniform_k_subset(names, positions, stream)]
        case StaticProbabilityConfig(p=p):
            stream = randomness.batch_stream(purpose)
            return [route_static_probability(names, p, positions, stream)]


def _masks(
    model: ComponentModel,
    ci: dict[str, CausalImportance],
    source: MaskSource,
    routes: dict[str, Route],
    randomness: StepRandomness,
    purpose: str,
) -> dict[str, MaskInfo]:
    match source:
        case "unmasked":
            return {n: MaskInfo(None, None, route) for n, route in routes.items()}
        case "ci":
            return {n: MaskInfo(ci[n].lower, None, route) for n, route in routes.items()}
        case "stochastic":
            config = model.config
            return stochastic_masks(
                ci,
                config.sampling,
                config.delta_component,
                routes,
                randomness.batch_stream(purpose),
            )
