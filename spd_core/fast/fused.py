"""Chains of elementwise operators, made one kernel on a GPU."""

from collections.abc import Callable
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def fused(function: Callable[P, T], device: torch.device) -> Callable[P, T]:
    """The pure function, compiled if the device is a GPU.

    `torch.compiler.set_stance("force_eager")` leaves it as it is there too.
    """
    return _compiled(function) if device.type == "cuda" else function


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)
