"""Causal importances: what of them adds up over positions, and which subcomponents are alive."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_core.ci_fns import CausalImportance
from spd_core.component_model import ComponentModel
from spd_core.config.metrics import AliveComponentsConfig, CiL0Config
from spd_core.distributed import Dist, over_ranks
from spd_core.metrics import matching
from spd_core.precision import at_least_float32

N_BINS = 50
RANGES = {"lower": (0.0, 1.0), "upper": (0.0, 1.1), "pre_sigmoid": (-3.0, 3.0)}

PositionsAgo = dict[str, Int[Tensor, "C"]]
"""How many positions ago each subcomponent of a module was last important, on this rank's data."""


def l0_sums(ci: dict[str, CausalImportance], config: CiL0Config) -> dict[str, Float[Tensor, "2"]]:
    """(active subcomponents, positions) of every module and group; the key has the threshold."""
    counts = component_sums(ci, config.threshold)
    n_positions = next(iter(counts.values()))[-1]
    # Another module than the first may run at fewer positions, as a pooler does.
    active = {name: c[:-1].sum() * (n_positions / c[-1]) for name, c in counts.items()}
    for group, patterns in config.groups.items():
        active[group] = torch.stack([active[n] for n in matching(list(ci), patterns)]).sum()
    prefix = f"ci_l0_{config.threshold}"
    return {f"{prefix}/{name}": torch.stack([n, n_positions]) for name, n in active.items()}


def component_sums(
    ci: dict[str, CausalImportance], threshold: float | None
) -> dict[str, Float[Tensor, "C_plus_1"]]:
    """Per module, of every subcomponent the sum of lower (or, with a threshold, how often it was
    above), then the number of positions."""
    sums = {}
    for name, module_ci in ci.items():
        lower = module_ci.lower.flatten(0, -2)
        values = lower if threshold is None else (lower > threshold).float()
        sums[name] = torch.cat([values.sum(0), lower.new_full((1,), float(len(lower)))])
    return sums


def histogram_sums(ci: dict[str, CausalImportance]) -> dict[str, Float[Tensor, "3 n_bins"]]:
    """Per module, counts of lower, upper and pre-sigmoid values.

    Values outside a histogram's range fall into its outermost bins.
    """

    def histogram(values: Tensor, low: float, high: float) -> Float[Tensor, "n_bins"]:
        # histc counts in float32, which stops at 2**24: in parts, added up in double.
        pieces = values.flatten().split(2**24)
        parts = [at_least_float32(piece).clamp(low, high) for piece in pieces]
        return torch.stack([part.histc(N_BINS, low, high).double() for part in parts]).sum(0)

    return {
        name: torch.stack([histogram(getattr(c, kind), *ends) for kind, ends in RANGES.items()])
        for name, c in ci.items()
    }


def never_important(config: AliveComponentsConfig | None, model: ComponentModel) -> PositionsAgo:
    """The state before training; empty where the metric is off."""
    if config is None:
        return {}
    return {
        name: torch.full((c.C,), config.n_examples, device=c.V.device)
        for name, c in model.components.items()
    }


def observe_alive(
    ago: PositionsAgo, ci: dict[str, CausalImportance], config: AliveComponentsConfig, dist: Dist
) -> None:
    """Take note of one batch of this rank, while the others have one of the same size."""
    # Of the first module: another may run at fewer positions, as a pooler does.
    n_positions = next(iter(ci.values())).lower[..., 0].numel() * dist.world_size
    for name, module_ci in ci.items():
        important = (module_ci.lower > config.threshold).flatten(0, -2).any(0)
        ago[name].add_(n_positions).masked_fill_(important, 0)


def n_alive(ago: PositionsAgo, config: AliveComponentsConfig, dist: Dist) -> dict[str, float]:
    """Subcomponents that were important on any rank in the last `n_examples` positions of all."""
    ago = over_ranks("min", ago, dist)
    return {name: float((module_ago < config.n_examples).sum()) for name, module_ago in ago.items()}
