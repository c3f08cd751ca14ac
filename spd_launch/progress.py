"""How a run is seen while it works: its status on disk, and a bar or lines on the console."""

import socket
import time

from rich.console import Console
from rich.progress import Progress, TextColumn

from spd_core.run_dir import RunDir
from spd_launch.run_record import State, Status, write_status

HEARTBEAT_S = 10.0


class Heartbeat:
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


class StepBar:
    """Shows steps and losses. On a terminal a bar; in a log file one line per report."""

    def __init__(self, steps: int, console: Console) -> None:
        self.console, self.steps, self.loss = console, steps, ""
        self.first: tuple[int, float] | None = None
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[at]}"))
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("decompose", total=steps, at="")

    def at(self, step: int, values: dict[str, float]) -> None:
        """So many steps are done; `values` are what was just logged, if anything was."""
        place = f"step {step}/{self.steps}"
        if self.first is None or step < self.first[0]:  # a rewind goes back
            self.first = step, time.monotonic()
            self.bar.start()  # not before: a target in training has a bar of its own
        else:
            rate = (step - self.first[0]) / (time.monotonic() - self.first[1])
            place += f"  {rate:.0f} steps/s"
        losses = {k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")}
        if losses:
            self.loss = f"loss {losses['total']:.2e}"
        if losses and not self.console.is_terminal:
            text = "  ".join(f"{name} {value:.2e}" for name, value in losses.items())
            self.console.print(f"{place}  {text}", soft_wrap=True)
        self.bar.update(self.task, completed=step, at=f"{place}  {self.loss}")
