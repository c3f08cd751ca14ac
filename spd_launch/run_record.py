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

# In a run's folder.
WANDB_URL, ERROR = "wandb_url.txt", "error.txt"
CRASHES, TIME_LIMITS = "crashes.jsonl", "time_limits.jsonl"
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
    status, crashes = read_status(run_dir), _lines(run_dir.path / CRASHES)
    assert status is not None, f"no status of {run_dir.path.name}"
    further = not crashes or status.step > crashes[-1]["step"]
    crashes.append({
        "step": status.step, "job_id": job_id, "time": time.time(), "requeued": further,
        "error": f"{type(error).__name__}: {error}",
    })  # fmt: skip
    write_atomic(run_dir.path / CRASHES, "".join(json.dumps(c) + "\n" for c in crashes))
    return further


def note_time_limit(run_dir: RunDir, job_id: str) -> None:
    """Write down that this job asked for another turn because its time was over."""
    limits = [*_lines(run_dir.path / TIME_LIMITS), {"job_id": job_id, "time": time.time()}]
    write_atomic(run_dir.path / TIME_LIMITS, "".join(json.dumps(x) + "\n" for x in limits))


def n_time_limits(run_dir: RunDir, job_id: str) -> int:
    """How many turns this job has asked for because its time was over.

    Slurm's own count of restarts also has those after preemptions, lost nodes and crashes.
    """
    return sum(x["job_id"] == job_id for x in _lines(run_dir.path / TIME_LIMITS))


def _lines(file: Path) -> list[dict[str, Any]]:
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
