"""The benchmark of one step, run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("dp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_json_line_of_consistent_figures(dp: int) -> None:
    command = [sys.executable, "-m", "benchmarks.step", "--experiment", "tms_5-2", "--batch", "32"]
    options = ["--steps", "3", "--threads", "1", "--dp", str(dp)]
    crashes = os.environ | {"PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=crashes, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0 < result["min_s"] <= result["median_s"]
    assert result["tokens_or_examples_per_s"] == pytest.approx(32 / result["median_s"])
    # V and U of both modules, and two layers of 16 with biases for each of 2 x 20 subcomponents.
    assert result["n_params"] == 2 * 20 * (5 + 2) + 2 * 20 * (16 + 16 + 16 + 1)
    assert result["dp"] == dp
