import pytest
import torch

from spd_core.precision import at_least_float32


@pytest.mark.parametrize(
    "given, wanted",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_alone_is_widened(given, wanted):
    x = torch.tensor([0.3, -2.0], dtype=given)
    assert at_least_float32(x).dtype == wanted and at_least_float32(x).equal(x.to(wanted))
