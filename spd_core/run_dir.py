"""Every path of a run, its metrics, and the one way files are written: whole or not at all."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


class RunDir:
    """The folder `runs/RUN_ID` of one run, every path in it, and the stores that runs share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.status_file = path / "status.json"
        self.metrics_file = path / "metrics.jsonl"
        self.rewinds_file = path / "rewinds.json"
        self.env_file = path / "env.json"
        self.report_file = path / "report.html"
        self.figures = path / "figures"
        self.checkpoints = path / "checkpoints"
        self.targets = path.parent.parent / "targets"
        self.data = path.parent.parent / "data"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside `path` for a new file or folder, which becomes `path` at the end.

    A reader, or a kill, sees what was there before or the new, never a part.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for written in [*temporary.glob("*")] or [temporary]:
            written.chmod(0o666 & ~umask)  # safetensors writes files for their owner alone
            sync(written)
        sync(temporary)
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Return when a file or folder is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(text)


def append_metrics(run_dir: RunDir, record: dict[str, float | int | str]) -> None:
    """Add one line to metrics.jsonl in a single write."""
    with open(run_dir.metrics_file, "a") as file:
        file.write(json.dumps({**record, "time": round(time.time(), 3)}) + "\n")


def read_metrics(run_dir: RunDir) -> list[dict[str, float | int | str]]:
    if not run_dir.metrics_file.exists():
        return []
    lines = run_dir.metrics_file.read_text().splitlines(keepends=True)
    # A line without its end is being written, or was when the run was killed.
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate_metrics(run_dir: RunDir, last_step: int) -> None:
    """Drop what lies after `last_step`, and a half-written last line, before a run continues."""
    kept = [record for record in read_metrics(run_dir) if int(record["step"]) <= last_step]
    write_atomic(run_dir.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))
