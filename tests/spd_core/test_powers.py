import numpy as np
import pytest
import torch

from spd_core.fast.powers import sums_of_powers


@pytest.mark.parametrize("p", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_numpy(p, as_tensor, dtype):
    x, n_times = torch.rand(40, 6, dtype=dtype, requires_grad=True), torch.arange(40, dtype=dtype)
    given = torch.tensor(p, dtype=dtype) if as_tensor else p
    sums = sums_of_powers(x, given, 1e-6, n_times)
    values, times = x.detach().double().numpy(), n_times.double().numpy()[:, None]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    wanted = (times * (values + 1e-6) ** p).sum(0)
    np.testing.assert_allclose(sums.detach(), wanted, rtol=tolerance)
    sums.sum().backward()
    slope = times * p * (values + 1e-6) ** (p - 1)
    np.testing.assert_allclose(x.grad, slope, rtol=10 * tolerance)
