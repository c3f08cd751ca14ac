"""Sums over positions of causal importances; sums of batches and ranks add up."""

from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor

from spd_core.ci_fns import CausalImportance
from spd_core.config.metrics import CiL0Config

N_BINS = 50
RANGES = {"lower": (0.0, 1.0), "upper": (0.0, 1.1), "pre_sigmoid": (-3.0, 3.0)}


@torch.no_grad()
def l0_sums(ci: dict[str, CausalImportance], config: CiL0Config) -> dict[str, Float[Tensor, "2"]]:
    """(active subcomponents, positions) of every module and group; the key has the threshold."""
    n_positions = next(iter(ci.values())).lower[..., 0].numel()
    active = {}
    for name, module_ci in ci.items():
        above = (module_ci.lower > config.threshold).flatten(0, -2)
        # A module may run at fewer positions than the first, as position embeddings do.
        active[name] = above.sum() * (n_positions / len(above))
    for group, patterns in config.groups.items():
        members = [n for n in ci if any(fnmatchcase(n, p) for p in patterns)]
        active[group] = torch.stack([active[n] for n in members]).sum()
    return {
        f"ci_l0_{config.threshold}/{name}": torch.stack([n, torch.full_like(n, n_positions)])
        for name, n in active.items()
    }


@torch.no_grad()
def component_sums(
    ci: dict[str, CausalImportance], threshold: float | None
) -> dict[str, Float[Tensor, "C_plus_1"]]:
    """Per module, of every subcomponent the sum of lower (or, with a threshold, how often it was
    above), then the number of positions."""
    sums = {}
    for name, module_ci in ci.items():
        lower = module_ci.lower.flatten(0, -2)
        values = lower if threshold is None else (lower > threshold).float()
        sums[name] = torch.cat([values.sum(0), lower.new_tensor([float(len(lower))])])
    return sums


@torch.no_grad()
def histogram_sums(ci: dict[str, CausalImportance]) -> dict[str, Float[Tensor, "3 n_bins"]]:
    """Per module, counts of lower, upper and pre-sigmoid values.

    Values outside a histogram's range fall into its outermost bins.
    """
    return {
        name: torch.stack(
            [_histogram(getattr(module_ci, kind), *ends) for kind, ends in RANGES.items()]
        )
        for name, module_ci in ci.items()
    }


def _histogram(values: Float[Tensor, "..."], low: float, high: float) -> Float[Tensor, "n_bins"]:
    # histc counts in float32, which stops at 2**24: in parts, added up in double.
    parts = values.flatten().split(2**24)
    return torch.stack(
        [torch.histc(part.clamp(low, high), N_BINS, low, high).double() for part in parts]
    ).sum(0)
