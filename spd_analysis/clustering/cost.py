"""What a partition costs in bits per sample, and what merging two of its groups changes.

The formulas are those of the package's docstring.
"""

import numpy as np
from jaxtyping import Float, Int

Number = float | Float[np.ndarray, "..."]


def rank(n_members: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """r_g, of groups with so many members."""
    return n_members


def description_length(
    s: Float[np.ndarray, "k"], n_members: Int[np.ndarray, "k"], alpha: float
) -> float:
    """The cost of k groups, of which `s` are the shares of samples that they are active on."""
    return float((s * (np.log2(len(s)) + alpha * rank(n_members))).sum())


def pair_change(
    s: tuple[Number, Number],
    n_members: tuple[Int[np.ndarray, "..."], Int[np.ndarray, "..."]],
    both: Number,
    bits: Number,
    alpha: float,
) -> Number:
    """What merging two groups changes, less what any merge does: S log2((k - 1) / k).

    `both` is the share of samples on which both are active, `bits` is log2(k - 1). Symmetric to
    the last bit, which ties between pairs depend on.
    """
    now = s[0] * rank(n_members[0]) + s[1] * rank(n_members[1])
    merged = (s[0] + s[1] - both) * rank(n_members[0] + n_members[1])
    return alpha * (merged - now) - both * bits
