"""What a run's folder says about who works on it: status.json and env.json."""

import json
import platform
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal

from spd_core.base_config import BaseConfig
from spd_core.run_dir import RunDir, write_atomic

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
