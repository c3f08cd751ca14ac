"""What a run tells the world while it works: metrics.jsonl, W&B, and a progress bar.

Only rank 0 tracks.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread
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

# How many seconds W&B may hold a run up: 115 in all, and 25 when the run was told to stop, for
# then it must be gone before its time limit. W&B itself keeps to START_S and FINISH_S unless its
# own process stands still; it gets GRACE_S to say so.
START_S, CALL_S, FINISH_S, GRACE_S = 30, 30, 60, 10
STOP_S, CLOSE_S = 20, 5


class Tracker:
    """Writes metrics and shows progress. On a terminal a bar; in a log file one line per report."""

    def __init__(self, config: RunConfig, run_dir: RunDir, console: Console, first_step: int):
        self.run_dir = run_dir
        self.console = console
        self.steps = config.train.steps
        self.first_step, self.started = first_step, time.monotonic()
        self.wandb = _Wandb(config, run_dir, console)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(
            "decompose", total=self.steps, completed=first_step, rate="", loss=""
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
        limit_s = FINISH_S + GRACE_S if self.progress.finished else STOP_S
        self.wandb.finish(exit_code=0 if error is None else 1, limit_s=limit_s)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and show the main losses."""
        record = {"step": step, **values}
        append_metrics(self.run_dir, record)
        # `step` also as a value: W&B numbers anew what a run that continues offline logs again.
        self.wandb.use(lambda run: run.log(record, step=step), CALL_S)
        losses = {k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")}
        text = "  ".join(f"{name} {value:.2e}" for name, value in losses.items())
        if losses and not self.console.is_terminal:
            self.console.print(
                f"step {step}/{self.steps}  {self._rate(step)}  {text}", soft_wrap=True
            )
        if losses:
            self.progress.update(self.task, loss=f"loss {losses['total']:.2e}")

    def log_figures(self, step: int, folder: Path) -> None:
        """Show the PNGs of a folder in W&B."""

        def send(run: Any) -> None:
            from wandb import Image

            figures = sorted(folder.glob("*.png"))
            run.log({f"figures/{path.stem}": Image(str(path)) for path in figures}, step=step)

        self.wandb.use(send, CALL_S)

    def save_files(self, files: dict[str, Path]) -> None:
        """Upload files to W&B, which lists them for the run under the given names.

        A name needs a folder (`run/config.yaml`): at the top W&B writes files of its own, among
        them a config.yaml, and there it would write through the link over ours.
        """
        assert all("/" in name for name in files), f"a name without a folder: {list(files)}"

        def send(run: Any) -> None:
            for name, path in files.items():
                link = Path(run.dir, name)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(path.resolve(strict=True))
                run.save(link, base_path=run.dir, policy="now")

        self.wandb.use(send, CALL_S)

    def advance(self, step: int) -> None:
        self.progress.update(self.task, completed=step, rate=self._rate(step))

    def _rate(self, step: int) -> str:
        elapsed = max(time.monotonic() - self.started, 1e-9)
        return f"{(step - self.first_step) / elapsed:.0f} steps/s"


class _Wandb:
    """The W&B run beside ours, whose id is the run's own; what fails in it only warns, once."""

    def __init__(self, config: RunConfig, run_dir: RunDir, console: Console):
        self.run_dir, self.console = run_dir, console
        self.run: Any | None = None
        mode = config.track.wandb.mode
        if mode == "disabled":
            return
        # Imported here: the loop works without W&B installed.
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"track.wandb.mode={mode} needs W&B ({error}): "
                "run `pip install wandb`, or set track.wandb.mode=disabled"
            ) from error
        self.run = self._attempt(lambda: _start_wandb(config, run_dir), START_S + GRACE_S)
        self.use(
            lambda run: console.print(f"W&B: {_place(run)}", markup=False, soft_wrap=True), CALL_S
        )

    def use(self, action: Callable[[Any], object], limit_s: float) -> None:
        """Do something with the W&B run, unless there is none or it has failed before."""
        if (run := self.run) is not None:
            self._attempt(lambda: action(run), limit_s)

    def finish(self, exit_code: int, limit_s: float) -> None:
        self.use(lambda run: run.finish(exit_code=exit_code), limit_s)
        if self.run is not None:
            self._close()

    def _attempt(self, action: Callable[[], Any], limit_s: float) -> Any | None:
        """The action's result; if it fails, None and a warning, and W&B is left alone."""
        try:
            return _within(limit_s, action)
        # Broad, for nothing that happens inside W&B is worth the loss of a run.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            kept = self.run_dir.path / "wandb" / "*run-*"
            self.console.print(
                f"W&B failed, the run goes on without it: {type(error).__name__}: {error}\n"
                f"All values are in {self.run_dir.metrics_file}; "
                f"`wandb sync {kept}` uploads what W&B kept.",
                style="yellow",
                markup=False,
                soft_wrap=True,
            )
            self._close()

    def _close(self) -> None:
        """End W&B's own process here, for the exit of ours would wait for it without a limit."""
        import wandb

        self.run = None
        with suppress(Exception, SystemExit):
            _within(CLOSE_S, wandb.teardown)


def _start_wandb(config: RunConfig, run_dir: RunDir) -> Any:
    import wandb

    # W&B's reports about its own errors hold up the exit when its server does not answer.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    options = config.track.wandb
    # No lines of W&B's own: set here and not in `init`, for else it asks on the terminal for a
    # missing API key.
    wandb.setup(
        wandb.Settings(
            show_info=False,
            quiet=True,
            console="off",
            init_timeout=START_S,
            finish_timeout=FINISH_S,
            finish_timeout_raises=True,
        )
    )
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


def _place(run: Any) -> str:
    if run.settings.mode == "online":
        return run.url
    return f"offline, `wandb sync {run.settings.sync_dir}` uploads it"


def _within(limit_s: float, action: Callable[[], Any]) -> Any:
    """The action's result. One that takes longer is left behind in its thread.

    Raises:
        TimeoutError: it takes longer.
    """
    result: Future[Any] = Future()

    def work() -> None:
        try:
            result.set_result(action())
        # Broad, for it is raised again in the caller's thread.
        except BaseException as error:  # noqa: BLE001
            result.set_exception(error)

    Thread(target=work, daemon=True).start()
    try:
        return result.result(limit_s)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer within {limit_s} s") from error


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
