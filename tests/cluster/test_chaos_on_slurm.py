"""A few minutes of `just chaos --where cluster`, as one types it."""

import os
import subprocess
import sys
from pathlib import Path

from cluster import Cluster

CHAOS = Path(__file__).parent.parent / "chaos" / "chaos.py"


def test_nothing_that_slurm_does_changes_what_a_run_becomes(slurm: Cluster) -> None:
    env = {**os.environ, "SPD_KEEP_CLUSTER": "1", "SLURM_CONF": str(slurm.conf)}
    # A run takes two minutes more. With this seed no machine is lost: see test_lost_machine.py.
    limits = ["--faults", "4", "--minutes", "1.5", "--seed", "4"]
    line = [sys.executable, str(CHAOS), "--where", "cluster", *limits]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout + done.stderr
