"""Importance minimality: few subcomponents should matter at each position."""

import torch
from jaxtyping import Float
from torch import Tensor

from spd_core.data.batches import Batch
from spd_core.fast.powers import sums_of_powers
from spd_core.losses.distance import LossParts

EPS = 1e-12


def importance_minimality(power_sums: Float[Tensor, "C_total_and_n"], beta: float) -> LossParts:
    """Sum over modules and c of s_c + beta s_c log2(1 + n s_c), from the whole `power_sums`.

    s_c is the mean over all n positions of all ranks of (upper_leaky + eps)^p. The sum is whole on
    every rank and its count is 1, so that sum over ranks / count over ranks is the loss.
    """
    n = power_sums[-1].detach()
    s = power_sums[:-1] / n
    return (s + beta * s * torch.log2(1 + n * s)).sum() if beta else s.sum(), 1


def power_sums(batch: Batch, p: float | Float[Tensor, ""]) -> Float[Tensor, "C_total_and_n"]:
    """Sums over positions of (upper_leaky + eps)^p, then the number of positions.

    The number goes along because ranks may hold unequal counts. A module that runs at fewer
    positions than the first (a pooler has one per example) counts as if at all.
    """
    sums, place, first = [], batch.place, next(iter(batch.distinct_ci.values())).lower
    n_times = first.new_ones(len(first)) if place is None else place.bincount().to(first)
    for module_ci in batch.distinct_ci.values():
        # Other sigmoids end at 1, where the powers' own changes nothing.
        x = module_ci.pre_sigmoid if module_ci.sigmoid == "leaky_hard" else module_ci.upper
        n_each = x[0, ..., 0].numel()
        own = sums_of_powers(x.flatten(0, -2), p, EPS, n_times.repeat_interleave(n_each))
        sums.append(own * (batch.n_positions / (n_each * len(batch.examples))))
    return torch.cat([*sums, sums[0].new_full((1,), float(batch.n_positions))])
