"""What a run tells the world while it works: metrics.jsonl, W&B, and a progress bar.

Only rank 0 tracks.
"""

import json
import platform
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from spd_core.config import RunConfig
from spd_core.run_dir import RunDir, append_metrics, write_atomic


class Tracker:
    """Writes metrics and shows progress. On a terminal a bar; in a log file one line per report."""

    def __init__(self, config: RunConfig, run_dir: RunDir, console: Console, first_step: int):
        self.run_dir = run_dir
        self.console = console
        self.steps = config.train.steps
        self.first_step, self.started = first_step, time.monotonic()
        self.wandb_run = _start_wandb(config, run_dir, console)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(
            "decompose", total=self.steps, completed=first_step, rate="", losses=""
        )

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.stop()
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=0 if error is None else 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and show the main losses."""
        append_metrics(self.run_dir, {"step": step, **values})
        if self.wandb_run is not None:
            self.wandb_run.log(values, step=step)
        losses = {k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")}
        text = "  ".join(f"{name} {value:.2e}" for name, value in losses.items())
        if losses and not self.console.is_terminal:
            self.console.print(
                f"step {step}/{self.steps}  {self._rate(step)}  {text}", soft_wrap=True
            )
        if losses:
            short = "  ".join(f"{_initials(name)} {value:.1e}" for name, value in losses.items())
            self.progress.update(self.task, losses=short)

    def advance(self, step: int) -> None:
        self.progress.update(self.task, completed=step, rate=self._rate(step))

    def _rate(self, step: int) -> str:
        elapsed = max(time.monotonic() - self.started, 1e-9)
        return f"{(step - self.first_step) / elapsed:.0f} steps/s"


def _initials(name: str) -> str:
    """`stochastic_recon_layerwise` becomes `stoch-layer`, short enough for a progress bar."""
    short = {
        "importance": "imp",
        "minimality": "min",
        "faithfulness": "faith",
        "stochastic": "stoch",
        "layerwise": "layer",
        "unmasked": "unm",
    }
    words = [short.get(w, w) for w in name.split("_") if w not in ("recon", "masked")]
    return "-".join(words)


def _start_wandb(config: RunConfig, run_dir: RunDir, console: Console) -> Any | None:
    """A W&B run whose id is the run's own, or None; an outage of W&B never stops a run."""
    options = config.track.wandb
    if options.mode == "disabled":
        return None
    # Imported here: the loop works without W&B installed.
    import wandb

    try:
        return wandb.init(
            mode=options.mode,
            project=options.project,
            entity=options.entity,
            group=options.group,
            tags=options.tags,
            id=run_dir.path.name,
            name=run_dir.path.name,
            resume="allow",
            dir=str(run_dir.path),
            config=config.model_dump(mode="json"),
        )
    except wandb.Error as error:
        console.print(f"[yellow]W&B is not reachable, the run goes on without it: {error}")
        return None


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
