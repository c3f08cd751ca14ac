"""A loss of nothing, which does on a given step's rank what a file in SPD_CHAOS tells it.

Of the batches of `nan_at` (numbers that are drawn by) it is not finite, on the first rank; then
nobody else may tell it not to be.
"""

import os
import time
from pathlib import Path

from torch import Tensor

from spd_core.component_model import ComponentModel
from spd_core.data.batches import Batch
from spd_core.losses.distance import LossParts


def loss(model: ComponentModel, batch: Batch, *, nan_at: list[int]) -> LossParts:  # noqa: ARG001
    nothing, of = batch.target_out.sum() * 0, batch.randomness
    if of.phase == "train" and of.part == 0 and of.step in nan_at:
        return nothing / 0, 1
    place = Path(os.environ["SPD_CHAOS"])
    if (place / "pace").exists():
        time.sleep(float((place / "pace").read_text()))
    order = place / f"order-{batch.randomness.part}"
    if not order.exists() or (nan_at and order.read_text() == "nan"):
        return nothing, 1
    return _obey(order.read_text(), nothing), 1


def _obey(order: str, nothing: Tensor) -> Tensor:
    match order:
        case "raise":
            raise ArithmeticError("told to fail")
        case "exit":
            os._exit(3)
        case "nan":
            return nothing / 0
        case "memory":
            hoard = []
            while True:
                hoard.append(bytearray(b"x" * 10_000_000))
        case _:
            raise AssertionError(order)
