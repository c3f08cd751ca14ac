"""What autocast must not round."""

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Sums over a batch, masks and powers of importances need the precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
