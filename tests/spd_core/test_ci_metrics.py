import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from spd_core.ci_fns import apply_sigmoid
from spd_core.distributed import Dist
from spd_core.metrics.ci import RANGES, ci_statistic, total

ONE = Dist(0, 1, torch.device("cpu"))


@given(st.sampled_from([(8,), (4, 5)]), st.floats(0, 0.9), st.floats(0, 0.9))
def test_statistics_of_parts_add_up(leading, l0, density):
    g = torch.randn(*leading, 3) * 2
    parts = [apply_sigmoid(p, "leaky_hard", None) for p in g.split(2)]
    whole = total([ci_statistic(p, l0, density) for p in parts], ONE)
    lower = np.clip(g.numpy().reshape(-1, 3), 0, 1)
    np.testing.assert_allclose(whole.n, len(lower))
    np.testing.assert_allclose(whole.lower_sum, lower.sum(0), rtol=1e-5)
    np.testing.assert_array_equal(whole.active_l0, (lower > np.float32(l0)).sum(0))
    np.testing.assert_array_equal(whole.active_density, (lower > np.float32(density)).sum(0))


def test_histograms_hold_every_value():
    g = torch.tensor([[-50.0, -0.5, 0.2], [0.5, 1.0, 90.0]])
    histograms = ci_statistic(apply_sigmoid(g, "leaky_hard", None), 0.1, 0.1).histograms
    values = {"lower": g.clamp(0, 1), "pre_sigmoid": g.clamp(-3, 3)}
    for kind, v in values.items():
        wanted, _ = np.histogram(v, bins=len(histograms[kind]), range=RANGES[kind])
        np.testing.assert_array_equal(histograms[kind], wanted)
    assert histograms["upper"].sum() == 6 and histograms["upper"][-1] == 1
