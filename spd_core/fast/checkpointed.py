"""Memory for time: what a call computes on its way is made again for gradients, not kept."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from spd_core.config import Checkpointing


def caller(checkpointing: Checkpointing, draws: bool) -> Callable[..., Any]:
    """How to call a ci_fn: caller(...)(ci_fn, *given) keeps only `given`, unless it is "off".

    Where it draws numbers it draws the same again, which no CUDA graph can record.
    """
    match checkpointing:
        case "off":
            return operator.call
        case "ci_fns":
            return partial(checkpoint, use_reentrant=False, preserve_rng_state=draws)
