"""Where the ranks of a run meet: a hashed port, probed by rank 0 and published in the run's folder.

Two jobs on one node must not meet, and a requeued attempt must not meet what its predecessor left
behind: the port follows from run id and restart count. It stays below the ephemeral range (from
32768), from which the kernel takes ports for outgoing connections.
"""

import hashlib
import json
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from spd_core.run_dir import write_atomic

FIRST_PORT, N_PORTS = 20000, 12768


@dataclass(frozen=True)
class Meeting:
    """What rank 0 tells the others."""

    address: str
    port: int
    attempt: int


def hashed_port(run_id: str, restart: int) -> int:
    digest = hashlib.sha256(f"{run_id}:{restart}".encode()).digest()
    return FIRST_PORT + int.from_bytes(digest[:8]) % N_PORTS


def free_port(run_id: str, restart: int) -> int:
    """The hashed port, or the next one that nobody on this machine listens on."""
    start = hashed_port(run_id, restart) - FIRST_PORT
    for offset in range(100):
        port = FIRST_PORT + (start + offset) % N_PORTS
        if _is_free(port):
            return port
    raise RuntimeError(f"no free port among 100 from {FIRST_PORT + start}")


def _is_free(port: int) -> bool:
    try:
        probe = socket.socket(socket.AF_INET6)
    except OSError:  # a kernel without IPv6
        probe = socket.socket(socket.AF_INET)
    with probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def publish(file: Path, meeting: Meeting) -> None:
    for old in file.parent.glob(f"{file.name.split('-')[0]}-*"):
        old.unlink(missing_ok=True)
    write_atomic(file, json.dumps(asdict(meeting)))


def await_meeting(file: Path, timeout_s: float = 300) -> Meeting:
    """Read what rank 0 published; it may take a network file system seconds to show the file."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            return Meeting(**json.loads(file.read_text()))
        except FileNotFoundError:
            time.sleep(0.1)
            list(file.parent.iterdir())  # makes NFS look again
    raise TimeoutError(f"rank 0 did not publish {file} within {timeout_s:.0f} s")
