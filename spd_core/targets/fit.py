"""The training loop of toy targets."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from spd_core.schedule import schedule_value
from spd_core.targets.config import TrainedTargetConfig

N_LAST = 100
CHECK_EVERY = 500


def fit(
    config: TrainedTargetConfig,
    parameters: Sequence[Tensor],
    loss_at: Callable[[int], Float[Tensor, ""]],
    solved: Callable[[], bool] = lambda: False,
) -> float:
    """Minimise the loss of step 0, 1, ... with AdamW; returns the mean of the last losses.

    Ends early when `solved`, which is asked every 500 steps.
    """
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr.start, weight_decay=config.weight_decay, fused=True
    )
    last: list[Float[Tensor, ""]] = []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule_value(config.lr, step, config.steps)
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        last = [*last[1 - N_LAST :], loss.detach()]
        if step % CHECK_EVERY == CHECK_EVERY - 1 and solved():
            break
    return torch.stack(last).mean().item()
