"""From a config to a trained decomposition. `spd_core.load_run` gives one back."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "load_run":
        raise AttributeError(f"module 'spd_core' has no attribute {name!r}")
    # Only now: planning a launch imports this package and must not wait for torch.
    from spd_core.load import load_run

    return load_run
