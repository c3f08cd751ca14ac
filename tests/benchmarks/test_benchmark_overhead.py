"""The benchmark of what it costs to be able to continue, run as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_shares_of_a_steps_time() -> None:
    options = ["--experiment", "tms_5-2", "--batch", "32", "--steps", "3", "--every", "10"]
    command = [sys.executable, "-m", "benchmarks.overhead", *options]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    result = json.loads(done.stdout)
    share = result["checkpoint_cpu_s"] / (10 * result["step_cpu_s"])
    assert result["checkpoint_percent"] == pytest.approx(100 * share)
    assert 0 < result["signals_and_heartbeat_percent"] < 5
    # Parameters and the two moments of AdamW, in float32, and a step for each of the tensors.
    n_parameters = 2 * 20 * (5 + 2) + 2 * 20 * (16 + 16 + 16 + 1)
    assert result["checkpoint_mib"] * 2**20 == pytest.approx(3 * 4 * n_parameters, rel=0.01)
