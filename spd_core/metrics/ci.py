"""Statistics of causal importances over many examples, gathered once for all metrics."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from spd_core.ci_fns import CausalImportance
from spd_core.distributed import Dist, all_sum

N_BINS = 50
RANGES = {"lower": (0.0, 1.0), "upper": (0.0, 1.1), "pre_sigmoid": (-3.0, 3.0)}


@dataclass(frozen=True)
class CiStatistic:
    """Sums over positions of one module; sums of parts add up to the whole."""

    n: Float[Tensor, ""]
    lower_sum: Float[Tensor, "C"]
    active_l0: Float[Tensor, "C"]
    active_density: Float[Tensor, "C"]
    histograms: dict[str, Float[Tensor, "n_bins"]]


@torch.no_grad()
def ci_statistic(
    ci: CausalImportance, l0_threshold: float, density_threshold: float
) -> CiStatistic:
    """Sums of one batch; values outside a histogram's range fall into its outermost bins."""
    lower = ci.lower.flatten(0, -2)
    return CiStatistic(
        n=torch.tensor(float(len(lower)), device=lower.device),
        lower_sum=lower.sum(0),
        active_l0=(lower > l0_threshold).sum(0).float(),
        active_density=(lower > density_threshold).sum(0).float(),
        histograms={
            kind: torch.histc(getattr(ci, kind).clamp(*RANGES[kind]), N_BINS, *RANGES[kind])
            for kind in RANGES
        },
    )


def total(statistics: list[CiStatistic], dist: Dist) -> CiStatistic:
    """The sum over batches and ranks."""
    return CiStatistic(
        n=all_sum(torch.stack([s.n for s in statistics]).sum(), dist),
        lower_sum=all_sum(torch.stack([s.lower_sum for s in statistics]).sum(0), dist),
        active_l0=all_sum(torch.stack([s.active_l0 for s in statistics]).sum(0), dist),
        active_density=all_sum(torch.stack([s.active_density for s in statistics]).sum(0), dist),
        histograms={
            kind: all_sum(torch.stack([s.histograms[kind] for s in statistics]).sum(0), dist)
            for kind in RANGES
        },
    )
