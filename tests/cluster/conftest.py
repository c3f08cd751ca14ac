"""The four-node Slurm of slurm_cluster.py as a fixture.

CI                  set: a machine that cannot run the cluster fails these tests, not skips them
SPD_KEEP_CLUSTER    1: use a cluster that is already up, and leave it up at the end
SPD_SLURM_DIR       where the cluster keeps its state
"""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from cluster import Cluster

HERE = Path(__file__).parent
SESSION_LOCK = Path("/run/spd-slurm-session.lock")
UP_S = 180


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # those of the whole session, not of this folder alone
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)


def command(*args: str) -> None:
    script = [sys.executable, str(HERE / "slurm_cluster.py"), *args]
    done = subprocess.run(script, capture_output=True, text=True, timeout=UP_S)
    if done.returncode != 0:
        pytest.fail(f"slurm_cluster.py {' '.join(args)}: {done.stdout}{done.stderr}")


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    if reason := slurm_cluster.obstacle():
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    keep = os.environ.get("SPD_KEEP_CLUSTER") == "1"
    # There is one cluster per machine: parallel test processes take turns.
    with SESSION_LOCK.open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("SLURM_CONF", str(slurm_cluster.CONF))
        if not keep:
            command("down")
        command("up")
        yield Cluster(slurm_cluster.CONF, slurm_cluster.NODES)
        if not keep:
            command("down")
