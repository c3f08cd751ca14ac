"""The processes of one command: one alone, several on this machine, or the tasks of an srun."""

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from spd_core import distributed
from spd_core.distributed import Dist


def run_here(n: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m MODULE ARGUMENTS` in n processes that `joined` brings together.

    Returns 0, or the exit code of the first that failed, which ends the others.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, **there, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(n)
    ]
    try:
        while True:
            codes = [rank.poll() for rank in ranks]
            if None not in codes or any(codes):
                return next((code for code in codes if code), 0)
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@contextmanager
def joined(device: Literal["auto", "cpu", "cuda"]) -> Iterator[Dist]:
    """This process among its peers, as torchrun's variables or Slurm's tell.

    `auto` is a GPU for each process, or the CPU where there are too few.
    """
    env = os.environ
    rank, size, local_rank, meeting = 0, 1, 0, ""
    if int(env.get("WORLD_SIZE", "1")) > 1:
        rank, size, local_rank = (int(env[v]) for v in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        meeting = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        if device == "auto" and torch.cuda.device_count() < size:
            device = "cpu"
    # SLURM_NTASKS is set in a batch script too, where nobody would come to meet us.
    elif int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        rank, local_rank = int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"])
        size = int(env["SLURM_STEP_NUM_TASKS"])
        meeting = _slurm_meeting()
    dist = distributed.init(rank, size, local_rank, meeting, device)
    yield dist
    distributed.shutdown()  # which waits for the others, so not where something failed


def _slurm_meeting() -> str:
    """The first node of this step; a port that follows from its id, below the ephemeral ones."""
    nodes = os.environ["SLURM_STEP_NODELIST"]
    command = ["scontrol", "show", "hostnames", nodes]
    hosts = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    digest = hashlib.sha256(step.encode()).digest()
    return f"{hosts.split()[0]}:{20000 + int.from_bytes(digest[:8]) % 12768}"
