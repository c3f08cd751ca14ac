"""Configs for launcher tests: composed from the real YAML once, then varied by `model_copy`."""

import copy
from functools import cache
from typing import Any

from spd_core.targets.store import target_name
from spd_launch.compose import compose
from spd_launch.config import JobConfig

SMALL = [
    "train.steps=4", "train.batch_size=64", "eval.batch_size=64", "eval.steps=1",
    "eval.every=2", "eval.slow_every=4", "target.steps=1000", "target.batch_size=512",
]  # fmt: skip


@cache
def _values(cluster: str) -> dict[str, Any]:
    return compose(["+experiment=tms_5-2", f"cluster={cluster}", *SMALL], multirun=False)[0].values


def config(cluster: str = "cpu", **changes: Any) -> JobConfig:
    """A run whose dotted fields, written a__b, are changed."""
    values = copy.deepcopy(_values(cluster))
    for name, value in changes.items():
        *path, last = name.split("__")
        place = values
        for key in path:
            place = place[key]
        place[last] = value
    return JobConfig.model_validate(values)


STORED = [target_name(config())]
