"""Every test of the core starts from the same global random state, on one thread."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
