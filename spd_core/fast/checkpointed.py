"""Memory for time: what a call computes on its way is made again for gradients, not kept."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from spd_core.config import Checkpointing


def caller(checkpointing: Checkpointing) -> Callable[..., Any]:
    """How to call a ci_fn that draws no numbers and keeps no state.

    caller(...)(ci_fn, *given) keeps only `given` for the gradients, unless it is "off".
    """
    match checkpointing:
        case "off":
            return operator.call
        case "ci_fns":
            return partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
