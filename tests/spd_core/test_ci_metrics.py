import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spd_core.ci_fns import CausalImportance, apply_sigmoid
from spd_core.config.metrics import CiL0Config
from spd_core.metrics.ci import RANGES, component_sums, histogram_sums, l0_sums


@given(st.sampled_from([(8,), (4, 5)]), st.floats(0, 0.9))
def test_sums_of_parts_add_up(leading, threshold):
    g = torch.randn(*leading, 3) * 2
    parts = [{"a": apply_sigmoid(part, "leaky_hard", None)} for part in g.split(2)]
    lower = np.clip(g.numpy().reshape(-1, 3), 0, 1)
    for t, values in {None: lower, threshold: lower > np.float32(threshold)}.items():
        whole = torch.stack([component_sums(part, t)["a"] for part in parts]).sum(0)
        np.testing.assert_allclose(whole, [*values.sum(0), len(lower)], rtol=1e-5)


def test_l0_of_modules_and_groups():
    g = {name: torch.randn(4, 5, C) for name, C in {"h.0.q": 3, "h.0.k": 2, "h.1.q": 4}.items()}
    ci = {name: apply_sigmoid(value, "leaky_hard", None) for name, value in g.items()}
    groups = {"layer 0": ["h.0.*"], "all q": ["*.q"], "both": ["h.1.*", "*.k"]}
    sums = l0_sums(ci, CiL0Config(when="fast", threshold=0.25, groups=groups))
    active = {name: (value.clamp(0, 1) > 0.25).sum().item() for name, value in g.items()}
    wanted = active | {
        "layer 0": active["h.0.q"] + active["h.0.k"],
        "all q": active["h.0.q"] + active["h.1.q"],
        "both": active["h.1.q"] + active["h.0.k"],
    }
    assert {key: pair.tolist() for key, pair in sums.items()} == {
        f"ci_l0_0.25/{name}": [pytest.approx(n), 20.0] for name, n in wanted.items()
    }


def test_histograms_hold_every_value():
    g = torch.tensor([[-50.0, -0.5, 0.2], [0.5, 1.0, 90.0]])
    sums = histogram_sums({"a": apply_sigmoid(g, "leaky_hard", None)})["a"]
    histograms = dict(zip(RANGES, sums, strict=True))
    values = {"lower": g.clamp(0, 1), "pre_sigmoid": g.clamp(-3, 3)}
    for kind, v in values.items():
        wanted, _ = np.histogram(v, bins=len(histograms[kind]), range=RANGES[kind])
        np.testing.assert_array_equal(histograms[kind], wanted)
    assert histograms["upper"].sum() == 6 and histograms["upper"][-1] == 1


def test_a_histogram_counts_beyond_what_float32_can_count():
    n = 2**24 + 1001
    values = torch.zeros(1).expand(n)
    sums = histogram_sums({"a": CausalImportance(values, values, "leaky_hard")})["a"]
    assert sums.sum(1).tolist() == [n, n, n]
