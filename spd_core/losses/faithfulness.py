"""Faithfulness: the subcomponents of a module must add up to its weight."""

import torch

from spd_core.components import LinearComponents
from spd_core.losses.distance import LossParts


def faithfulness(components: dict[str, LinearComponents]) -> LossParts:
    """Sum over modules of |W - (V U)^T|^2, over the total weight count."""
    errors = [c.weight_error().square().sum() for c in components.values()]
    return torch.stack(errors).sum(), sum(c.weight.numel() for c in components.values())
