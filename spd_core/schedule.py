"""One schedule for learning rates, loss coefficients and the p of importance minimality."""

import math
from collections.abc import Mapping

from spd_core.base_config import ScheduleConfig
from spd_core.config.losses import ImportanceMinimalityConfig, LossConfig


def schedule_value(schedule: ScheduleConfig | float, step: int, steps: int) -> float:
    """The value at `step` of 0..steps-1, of which the last has `end` exactly (unless it is alone).

    After the warm-up it moves by t, or for a cosine (1 - cos(pi t)) / 2, of the way from `start`.
    """
    if not isinstance(schedule, ScheduleConfig):
        return schedule
    n_warmup = min(round(schedule.warmup_fraction * steps), steps - 1)
    if step < n_warmup:
        return schedule.start * step / n_warmup
    t = min((step - n_warmup) / max(steps - 1 - n_warmup, 1), 1.0)
    match schedule.kind:
        case "constant" | "linear":
            return schedule.start + (schedule.end - schedule.start) * t
        case "cosine":
            return schedule.end + (schedule.start - schedule.end) * (1 + math.cos(math.pi * t)) / 2


def annealed_p(config: ImportanceMinimalityConfig, position: float) -> float:
    """p, moving linearly to p_anneal_final_p between the two positions of training (0 to 1)."""
    start, end = config.p_anneal_start_frac, config.p_anneal_end_frac
    if position < start:
        return config.p
    if position >= end:
        return config.p_anneal_final_p
    return config.p + (config.p_anneal_final_p - config.p) * (position - start) / (end - start)


def annealed_ps(losses: Mapping[str, LossConfig], position: float) -> dict[str, float]:
    """The p of every importance minimality."""
    minimality = {n: o for n, o in losses.items() if isinstance(o, ImportanceMinimalityConfig)}
    return {name: annealed_p(o, position) for name, o in minimality.items()}
