"""Every test of the core starts from the same global random state, on one thread."""

import pytest
import torch

from spd_core.fast import native


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=["loops", "operators"])
def either_way(request, monkeypatch):
    """With compiled loops, and with PyTorch's operators."""
    if request.param == "operators":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler")
