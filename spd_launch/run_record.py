"""What a run's folder says about who works on it: status.json and env.json."""

import json
import platform
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from spd_core.base_config import BaseConfig
from spd_core.run_dir import RunDir, write_atomic

HEARTBEAT_S = 10.0
WANDB_URL = "wandb_url.txt"  # in a run's folder
State = Literal["pending", "running", "stopped", "finished", "failed", "cancelled"]


class Status(BaseConfig):
    state: State
    step: int
    steps: int
    heartbeat: float
    attempt: int
    job_id: str | None
    host: str


def read_status(run_dir: RunDir) -> Status | None:
    """The run's status, or None before it was launched."""
    with suppress(FileNotFoundError):
        return Status.model_validate_json(run_dir.status_file.read_text())
    return None


def write_status(run_dir: RunDir, status: Status) -> None:
    write_atomic(run_dir.status_file, status.model_dump_json() + "\n")


def read_wandb_url(run_dir: RunDir) -> str | None:
    """Where W&B shows the run; None where it does not."""
    with suppress(FileNotFoundError):
        return (run_dir.path / WANDB_URL).read_text().strip()
    return None


class Progress:
    """The status of a run while this process works on it; without a folder nothing is written."""

    def __init__(self, run_dir: RunDir | None, steps: int, attempt: int, job_id: str) -> None:
        self.run_dir, self.steps, self.attempt, self.job_id = run_dir, steps, attempt, job_id
        self.step, self.written = 0, float("-inf")

    def at(self, step: int) -> None:
        """So many steps are done; written down once in a while."""
        self.step = step
        if time.monotonic() - self.written > HEARTBEAT_S:
            self.write("running")
            self.written = time.monotonic()

    def write(self, state: State) -> None:
        if self.run_dir is not None:
            write_status(self.run_dir, Status(
                state=state, step=self.step, steps=self.steps, heartbeat=time.time(),
                attempt=self.attempt, job_id=self.job_id, host=socket.gethostname(),
            ))  # fmt: skip


def write_environment(run_dir: RunDir) -> None:
    """Record what the run ran on: versions, machine, command and code."""
    import torch  # the ledger imports this file, and planning must not wait for torch

    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "host": platform.node(),
        "n_threads": torch.get_num_threads(),
        "command": sys.argv,
        "code": str(Path(__file__).parent.parent),
    }
    write_atomic(run_dir.env_file, json.dumps(record, indent=2) + "\n")
