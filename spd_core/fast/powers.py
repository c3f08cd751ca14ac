"""Sums of powers of causal importances over positions, which are read once, before the sigmoid."""

from jaxtyping import Float
from torch import Tensor

from spd_core.fast import native
from spd_core.fast.fused import fused
from spd_core.fast.leaky_hard import upper_leaky_hard


def sums_of_powers(
    x: Float[Tensor, "n C"], p: float | Float[Tensor, ""], eps: float, n_times: Float[Tensor, "n"]
) -> Float[Tensor, "C"]:
    """Sums over n of n_times (upper_leaky_hard(x) + eps)^p, in the precision of n_times."""
    if native.is_native(x) and isinstance(p, float):
        return native.power_sums(x, p, eps, n_times)
    if x.is_cuda and isinstance(p, float):
        p = n_times.new_full((), p)  # another float would be compiled again
    return fused(_power_sums, x.device)(x, p, eps, n_times)


def _power_sums(x: Tensor, p: float | Tensor, eps: float, n_times: Tensor) -> Tensor:
    upper = upper_leaky_hard(x.to(n_times.dtype))
    return (n_times[:, None] * (upper + eps) ** p).sum(0)  # autocast rounds a @
