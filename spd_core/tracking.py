"""What a run tells the world while it works: metrics.jsonl, a progress bar, and W&B.

Only rank 0 tracks.
"""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn

from spd_core.config import RunConfig
from spd_core.run_dir import RunDir, append_metrics, write_atomic

# Seconds that W&B has in the end; less where a run was told to stop, before its time limit.
FINISH_S, STOP_S = 70, 20


class Tracker:
    """Writes metrics and shows progress. On a terminal a bar; in a log file one line per report.

    W&B follows the run's folder in a process of its own, so that it can hold nothing up.

    Raises:
        ValueError: W&B is asked for, but not installed.
    """

    def __init__(self, config: RunConfig, run_dir: RunDir, console: Console, first_step: int):
        self.run_dir, self.console, self.steps = run_dir, console, config.train.steps
        self.first_step, self.started = first_step, time.monotonic()
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[at]}"))
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task(
            "decompose", total=self.steps, completed=first_step, at=""
        )
        self.total = ""
        mode = config.track.wandb.mode
        self.upload = None if mode == "disabled" else self._start_upload(mode)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.progress.stop()
        self._end_upload(FINISH_S if self.progress.finished else STOP_S)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and show the main losses."""
        append_metrics(self.run_dir, {"step": step, **values})
        losses = {k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")}
        if losses:
            self.total = f"loss {losses['total']:.2e}"
        if losses and not self.console.is_terminal:
            text = "  ".join(f"{name} {value:.2e}" for name, value in losses.items())
            self.console.print(f"{self._at(step)}  {text}", soft_wrap=True)
        if self.upload is not None and self.upload.poll() is not None:
            self._end_upload(0)

    def advance(self, step: int) -> None:
        self.progress.update(self.task, completed=step, at=f"{self._at(step)}  {self.total}")

    def _at(self, step: int) -> str:
        rate = (step - self.first_step) / max(time.monotonic() - self.started, 1e-9)
        return f"step {step}/{self.steps}  {rate:.0f} steps/s"

    def _start_upload(self, mode: str) -> subprocess.Popen[bytes]:
        if find_spec("wandb") is None:
            raise ValueError(
                f"track.wandb.mode={mode} needs W&B, which is not installed: "
                "run `pip install wandb`, or set track.wandb.mode=disabled"
            )
        command = [sys.executable, "-m", "spd_core.upload", self.run_dir.path, str(self.first_step)]
        # Its reports about errors hold up the exit; whose memory and GPU it shows; which code runs.
        env = {"WANDB_ERROR_REPORTING": "false", "WANDB__STATS_PID": str(os.getpid()), **os.environ}
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        with open(self.run_dir.upload_log, "wb") as log:
            return subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, stderr=log, start_new_session=True
            )

    def _end_upload(self, limit_s: float) -> None:
        """Let W&B have the rest within so many seconds, and warn if it failed."""
        upload, self.upload = self.upload, None
        if upload is None:
            return
        assert upload.stdin is not None
        upload.stdin.close()  # which says that training has ended
        try:
            if upload.wait(limit_s) == 0:
                return
            problem = self.run_dir.upload_log.read_text(errors="replace").strip().split("\n")[-1]
        except subprocess.TimeoutExpired:
            upload.kill()
            problem = f"no answer within {limit_s} s"
        self.console.print(
            f"W&B failed, the run goes on without it: {problem}\n"
            f"All values are in {self.run_dir.metrics_file}; "
            f"`python -m spd_core.upload {self.run_dir.path}` uploads them later.",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )


def write_environment(run_dir: RunDir) -> None:
    """Record what the run ran on: versions, machine, command and commit."""
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
