"""Ranks whose machine leaves the network: nothing is closed, it only falls silent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster import Cluster, wait_for
from slurm_cluster import ADDRESS, CTL, namespace, running, start

ROOT = Path(__file__).parent.parent.parent
PROGRAM = """
import sys, time, torch
from pathlib import Path
from spd_core import distributed
from spd_launch.peers import watching
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist = distributed.init(rank, 3, rank, f"{sys.argv[3]}:29517", "cpu")
with watching(dist, sys.argv[3], (folder / f"marked-{rank}").touch):
    (folder / f"in-{rank}").touch()
    while True:
        distributed.all_reduce("sum", torch.ones(1), dist)
        time.sleep(0.01)
"""


def test_ranks_of_a_lost_machine_and_the_others_end(slurm: Cluster, tmp_path: Path) -> None:
    nodes = slurm.nodes[:3]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0"}
    program = [sys.executable, "-c", PROGRAM]
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", namespace(node), *program, str(i), tmp_path, ADDRESS[nodes[0]]],
            env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )
        for i, node in enumerate(nodes)
    ]  # fmt: skip
    wait_for(lambda: len(list(tmp_path.glob("in-*"))) == 3, 240, "the ranks to meet")
    subprocess.run(["ip", "-n", namespace(CTL), "link", "set", nodes[2], "down"], check=True)
    deadline = time.monotonic() + 180
    try:
        errors = [rank.communicate(timeout=deadline - time.monotonic())[1] for rank in ranks]
    finally:
        subprocess.run(["ip", "-n", namespace(CTL), "link", "set", nodes[2], "up"], check=True)
        for rank in ranks:
            rank.kill()
        restart_slurmd(nodes[2])
    for i, error in enumerate(errors):
        lost = 0 if i == 2 else 2
        assert f"rank {lost} stopped answering (killed?); this rank ({i}) ends" in error
    assert [rank.returncode for rank in ranks] == [1, 1, 1]
    assert len(list(tmp_path.glob("marked-*"))) == 3


def restart_slurmd(node: str) -> None:
    """A new one says at once that the node is back; of an old one it is heard in a minute."""
    [slurmd] = [pid for pid, name in running(node).items() if name == "slurmd"]
    os.kill(slurmd, signal.SIGKILL)
    wait_for(lambda: "slurmd" not in running(node).values(), 60, "slurmd to end")
    start(node, "slurmd", "-D", "-N", node)
