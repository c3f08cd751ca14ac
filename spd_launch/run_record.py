"""What a run's folder says about who works on it: status.json and env.json."""

import json
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from spd_core.base_config import BaseConfig
from spd_core.run_dir import RunDir, write_atomic

WANDB_URL, ERROR, CRASHES = "wandb_url.txt", "error.txt", "crashes.jsonl"  # in a run's folder
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


def note_crash(run_dir: RunDir, job_id: str, error: BaseException) -> bool:
    """Write down at which step a job crashed; whether the run got further than last time."""
    status, crashes = read_status(run_dir), _crashes(run_dir)
    assert status is not None, f"no status of {run_dir.path.name}"
    further = not crashes or status.step > crashes[-1]["step"]
    crashes.append({
        "step": status.step, "job_id": job_id, "time": time.time(), "requeued": further,
        "error": f"{type(error).__name__}: {error}",
    })  # fmt: skip
    write_atomic(run_dir.path / CRASHES, "".join(json.dumps(c) + "\n" for c in crashes))
    return further


def n_crash_requeues(run_dir: RunDir, job_id: str) -> int:
    """How many turns of this job were for crashes, and not for time limits and preemptions."""
    return sum(c["requeued"] for c in _crashes(run_dir) if c["job_id"] == job_id)


def _crashes(run_dir: RunDir) -> list[dict[str, Any]]:
    file = run_dir.path / CRASHES
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def read_error(run_dir: RunDir) -> str:
    """What a failed run failed of, in one line; empty where it had no time to say."""
    file = run_dir.path / ERROR
    return " ".join(file.read_text().split()) if file.exists() else ""


def write_environment(run_dir: RunDir, commit: str | None) -> None:
    """Record what the run ran on: versions, machine, command and code (`commit`: its snapshot)."""
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
        "commit": commit,
    }
    write_atomic(run_dir.env_file, json.dumps(record, indent=2) + "\n")
