"""What a run tells the world while it works: metrics.jsonl, and a progress bar."""

import time

from rich.console import Console
from rich.progress import Progress, TextColumn

from spd_core.config import RunConfig
from spd_core.run_dir import RunDir, append_metrics


class Tracker:
    """Writes metrics and shows progress. On a terminal a bar; in a log file one line per report.

    The bar is seen inside `with tracker.bar`. Without a folder, as on every rank but 0, nothing is
    written.
    """

    def __init__(
        self, config: RunConfig, run_dir: RunDir | None, console: Console, first_step: int
    ) -> None:
        self.run_dir, self.console, self.steps = run_dir, console, config.train.steps
        self.first_step, self.started = first_step, time.monotonic()
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[at]}"))
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("decompose", total=self.steps, completed=first_step, at="")
        self.total = ""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and show the main losses."""
        if self.run_dir is not None:
            append_metrics(self.run_dir, {"step": step, **values})
        losses = {k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")}
        if losses:
            self.total = f"loss {losses['total']:.2e}"
        if losses and not self.console.is_terminal:
            text = "  ".join(f"{name} {value:.2e}" for name, value in losses.items())
            self.console.print(f"{self._at(step)}  {text}", soft_wrap=True)

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step, at=f"{self._at(step)}  {self.total}")

    def _at(self, step: int) -> str:
        rate = (step - self.first_step) / max(time.monotonic() - self.started, 1e-9)
        return f"step {step}/{self.steps}  {rate:.0f} steps/s"
