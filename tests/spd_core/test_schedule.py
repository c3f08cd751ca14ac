import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spd_core.base_config import ScheduleConfig
from spd_core.config.losses import ImportanceMinimalityConfig
from spd_core.schedule import annealed_p, schedule_value

VALUE = st.floats(1e-5, 10)


def schedule(kind, start, end, warmup=0.0):
    return ScheduleConfig(kind=kind, start=start, end=end, warmup_fraction=warmup)


@given(st.sampled_from(["linear", "cosine"]), VALUE, VALUE, st.integers(2, 1000))
def test_ends(kind, start, end, steps):
    s = schedule(kind, start, end)
    assert schedule_value(s, 0, steps) == pytest.approx(start)
    assert schedule_value(s, steps - 1, steps) == pytest.approx(end)


@pytest.mark.parametrize("kind, at_quarter", [
    ("linear", 3.0), ("cosine", 2 + (1 + math.cos(math.pi / 4)) * (4 - 2) / 2 - 0.5),
])  # fmt: skip
def test_quarter_and_middle(kind, at_quarter):
    s = schedule(kind, 3.5, 1.5)
    assert schedule_value(s, 25, 101) == pytest.approx(at_quarter)
    assert schedule_value(s, 50, 101) == pytest.approx(2.5)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warm_up_rises_from_zero_then_the_schedule_begins(kind):
    s = schedule(kind, 2.0, 2.0 if kind == "constant" else 1.0, warmup=0.25)
    assert [schedule_value(s, i, 40) for i in (0, 5, 10)] == pytest.approx([0.0, 1.0, 2.0])
    assert schedule_value(s, 39, 40) == pytest.approx(s.end)


@given(st.sampled_from(["linear", "cosine"]), st.integers(2, 200))
def test_falls_steadily(kind, steps):
    values = [schedule_value(schedule(kind, 1.0, 0.1), i, steps) for i in range(steps)]
    assert values == sorted(values, reverse=True)


def test_coefficient_is_a_number_or_a_schedule():
    assert schedule_value(0.3, 5, 10) == 0.3
    assert schedule_value(schedule("linear", 0.0, 1.0), 5, 11) == pytest.approx(0.5)


def minimality(start, end):
    return ImportanceMinimalityConfig(
        p=2.0, beta=0, p_anneal_start_frac=start, p_anneal_end_frac=end, p_anneal_final_p=0.4
    )


@pytest.mark.parametrize("step, p", [(0, 2.0), (50, 2.0), (100, 1.2), (150, 0.4), (199, 0.4)])
def test_p_anneals_between_two_positions(step, p):
    assert annealed_p(minimality(0.25, 0.75), step / 200) == pytest.approx(p)


@given(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_p_with_equal_start_and_end_is_a_jump(position):
    config = minimality(position, position)
    values = [annealed_p(config, step / 8) for step in range(9)]
    assert values == [2.0 if step < 8 * position else 0.4 for step in range(9)]
