"""A few minutes of `just chaos`, as one types it."""

import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parent / "chaos.py"


@pytest.mark.slow
def test_no_fault_on_this_machine_changes_what_a_run_becomes() -> None:
    done = subprocess.run(
        [sys.executable, CHAOS, "--faults", "30", "--minutes", "2"], capture_output=True, text=True
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout + done.stderr
