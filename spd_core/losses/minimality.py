"""Importance minimality: few subcomponents should matter at each position."""

import torch
from jaxtyping import Float
from torch import Tensor

from spd_core.ci_fns import CausalImportance
from spd_core.distributed import Dist, all_sum_with_grad
from spd_core.losses.distance import LossParts

EPS = 1e-12


def importance_minimality(
    ci: dict[str, CausalImportance], p: float, beta: float, dist: Dist
) -> LossParts:
    """Sum over modules and c of s_c + beta s_c log2(1 + n s_c).

    s_c is the mean over all n positions of all ranks of (upper_leaky + eps)^p. The sum is whole on
    every rank and its count is 1, so that sum over ranks / count over ranks is the loss.
    """
    n_local = next(iter(ci.values())).upper[..., 0].numel()
    sums: Float[Tensor, "C_total"] = torch.cat(
        [_power_sum(module_ci.upper, p) for module_ci in ci.values()]
    )
    # Ranks may hold unequal counts, so positions are summed along with the powers.
    counted = all_sum_with_grad(torch.cat([sums, sums.new_tensor([float(n_local)])]), dist)
    n = counted[-1].detach()
    s = counted[:-1] / n
    return (s + beta * s * torch.log2(1 + n * s)).sum() if beta else s.sum(), 1


def _power_sum(upper: Float[Tensor, "... C"], p: float) -> Float[Tensor, "C"]:
    shifted = upper + EPS
    return (shifted if p == 1 else shifted**p).flatten(0, -2).sum(0)
