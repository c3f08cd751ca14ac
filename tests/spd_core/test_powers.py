import numpy as np
import pytest
import torch

from spd_core.fast.powers import sums_of_powers


@pytest.mark.parametrize("p", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_numpy(p, as_tensor, dtype):
    x, n_times = 4 * torch.rand(40, 6, dtype=dtype) - 1.5, torch.arange(40, dtype=dtype)
    x.requires_grad_()
    given = torch.tensor(p, dtype=dtype) if as_tensor else p
    sums = sums_of_powers(x, given, 1e-6, n_times)
    values, times = x.detach().double().numpy(), n_times.double().numpy()[:, None]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    upper = values.clip(0, 1) + 0.01 * (values - 1).clip(0)
    wanted = (times * (upper + 1e-6) ** p).sum(0)
    np.testing.assert_allclose(sums.detach(), wanted, rtol=tolerance)
    sums.sum().backward()
    of_upper = np.select([values < 0, values < 1], [0, 1], 0.01)
    slope = times * p * (upper + 1e-6) ** (p - 1) * of_upper
    np.testing.assert_allclose(x.grad, slope, rtol=10 * tolerance)


def test_bfloat16_is_raised_to_powers_in_float32():
    x, n_times = torch.rand(40, 6).bfloat16().requires_grad_(), torch.ones(40)
    sums, exact = sums_of_powers(x, 0.3, 1e-6, n_times), x.detach().double()
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), ((exact + 1e-6) ** 0.3).sum(0), rtol=1e-5, atol=0)
    sums.sum().backward()
    slope = 0.3 * (exact + 1e-6) ** -0.7
    torch.testing.assert_close(x.grad.double(), slope, rtol=2**-8, atol=0)
