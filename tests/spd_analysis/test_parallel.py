import re

import pytest

from spd_analysis.parallel import axis, parallel_coordinates, wrapped


@pytest.mark.parametrize("values, heights, ticks", [
    ([0.0, 5.0, 10], [0, 0.5, 1], ["0", "10"]),
    ([1e-4, 1e-2, 1.0], [0, 0.5, 1], ["0.0001", "1"]),  # far apart: logarithmic
    ([-1.0, 99.0, 24.0], [0, 1, 0.25], ["-1", "99"]),  # not all positive: linear
    (["b", "a", None, "c"], [0.5, 0, None, 1], ["a", "b", "c"]),
    ([1, "x"], [0, 1], ["1", "x"]),
    ([2.0, None, float("nan"), 4.0], [0, None, None, 1], ["2", "4"]),
    ([3.0, 3.0], [0, 0], ["3", "3"]), ([float("inf")], [None], ["0", "0"]),
    ([0.99999, 0.99998], [1, 0], ["0.99998", "0.99999"]),
])  # fmt: skip
def test_heights_and_ticks(values, heights, ticks):
    found, labels = axis(values)
    assert found == [None if h is None else pytest.approx(h) for h in heights]
    assert [label for _, label in labels] == ticks


@pytest.mark.parametrize("name, lines", [
    ("seed", ["seed"]), ("ci_l0_0.1 total", ["ci_l0_0.1 total"]),
    ("losses.importance_minimality.coeff", ["losses.importance_", "minimality.coeff"]),
    ("a_name_without_any_end", ["a_name_without_", "any_end"]),
    ("averyveryveryverylongone", ["averyveryveryverylongone"]),
])  # fmt: skip
def test_names_break_at_dots_and_underscores(name, lines):
    assert wrapped(name, 18) == lines


def test_a_line_per_run_that_a_missing_value_interrupts():
    columns = {"x": [0.0, 1.0], "<y>": [None, 2.0], "z": [3.0, 4.0], "w": [5.0, 6.0]}
    svg = parallel_coordinates(["a<b", "c"], columns, "z")
    paths = dict(re.findall(r"data-run='([^']+)' d='([^']+)'", svg))
    assert list(paths) == ["a&lt;b", "c"] and "&lt;y&gt;" in svg and "<y>" not in svg
    assert re.sub(r"[\d. ]+", "", paths["a&lt;b"]) == "MML"  # nothing joined to what is missing
    assert re.sub(r"[\d. ]+", "", paths["c"]) == "MLLL"
    ys = [float(y) for y in re.findall(r" ([\d.]+)", paths["c"])]
    assert ys[0] == ys[2] == ys[3] < ys[1]  # largest on top; the only value of <y> at the foot
    assert "hsl(210 " in svg and "hsl(30 " in svg
