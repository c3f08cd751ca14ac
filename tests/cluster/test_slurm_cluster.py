"""The test cluster itself: what the other tests in this folder take for granted."""

import shlex
import sys
from pathlib import Path

from cluster import Cluster, wait_for

EXCHANGE = """
import os, socket, subprocess, time

rank = int(os.environ["SLURM_PROCID"])
first = subprocess.check_output(["scontrol", "show", "hostnames"], text=True).split()[0]
if rank == 0:
    with socket.create_server((socket.gethostname(), 29511)) as server:
        server.settimeout(100)
        peer = server.accept()[0]
else:
    for _ in range(500):
        try:
            peer = socket.create_connection((first, 29511), timeout=100)
            break
        except ConnectionRefusedError:
            time.sleep(0.2)
peer.sendall(f"hello from {socket.gethostname()}".encode())
peer.shutdown(socket.SHUT_WR)
heard = b"".join(iter(lambda: peer.recv(64), b"")).decode()
print(f"{socket.gethostname()} heard: {heard}")
"""

TRAPPED = """
import os, signal, sys, time

def note(number, _frame):
    print("got", signal.Signals(number).name, flush=True)

signal.signal(signal.SIGTERM, note)
attempt = int(os.environ.get("SLURM_RESTART_COUNT", 0))
print("attempt", attempt, flush=True)
while attempt == 0:
    time.sleep(0.2)
"""


def test_four_nodes_with_gpus(slurm: Cluster) -> None:
    shown = slurm.run("sinfo", "--noheader", "-N", "-p", "main", "-o", "%N %c %G").splitlines()
    assert shown == [f"{node} 16 gpu:8" for node in slurm.nodes]


def test_two_nodes_exchange_bytes(slurm: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    heard = slurm.run("srun", "-N2", "--ntasks-per-node=1", sys.executable, script)
    one, two = sorted(line.split()[0] for line in heard.splitlines())
    assert one != two
    assert {one, two} <= set(slurm.nodes)
    assert f"{one} heard: hello from {two}" in heard
    assert f"{two} heard: hello from {one}" in heard


def test_array_tasks_get_their_own_gpus(slurm: Cluster, tmp_path: Path) -> None:
    # They meet: who comes when another has ended would get the GPUs of that one.
    meet = f"while [ $(ls {tmp_path} | wc -l) -lt 3 ]; do sleep 0.1; done"
    show = f"echo $(hostname) $CUDA_VISIBLE_DEVICES; {meet}"
    slurm.submit("--wait", "--array=0-2", "--gpus=4", f"--output={tmp_path}/%a", "--wrap", show)
    seen = [(tmp_path / str(task)).read_text().strip() for task in range(3)]
    assert len(set(seen)) == 3
    assert {line.split()[1] for line in seen} == {"0,1,2,3", "4,5,6,7"}


def test_preempted_job_is_requeued(slurm: Cluster, tmp_path: Path) -> None:
    script, log = tmp_path / "trapped.py", tmp_path / "log"
    script.write_text(TRAPPED)
    whole = ["--nodes=4", "--exclusive", "--open-mode=append", f"--output={log}"]
    srun = shlex.join(["srun", "--nodes=1", "--ntasks=1", sys.executable, str(script)])
    low = slurm.submit("--partition=scavenge", *whole, "--wrap", srun)
    wait_for(lambda: log.exists() and "attempt 0" in log.read_text(), 120, "the scavenge job")
    high = slurm.submit("--partition=main", *whole, "--wrap", "true")
    # SIGTERM first; the job, which ignores it, is killed after the partition's GraceTime.
    wait_for(lambda: "got SIGTERM" in log.read_text(), 60, "SIGTERM")
    assert slurm.state(low) == "RUNNING"
    wait_for(lambda: slurm.state(high) == "COMPLETED", 240, "the job that preempts")
    wait_for(lambda: slurm.state(low) == "COMPLETED", 240, "the second attempt")
    assert "attempt 1" in log.read_text()
    attempts = ["sacct", "--duplicates", "--noheader", "-X", "-P", "-o", "State", "-j", low]
    wait_for(
        lambda: sorted(slurm.run(*attempts).split()) == ["COMPLETED", "PREEMPTED"],
        180,
        "both attempts in sacct",
    )
