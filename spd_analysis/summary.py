"""The short table at the end of a run."""

import json

from rich import box
from rich.console import Console
from rich.table import Table

from spd_core.run_dir import RunDir, read_metrics


def final_metrics(run_dir: RunDir) -> dict[str, float]:
    """The last value of every metric of a run.

    Raises:
        ValueError: the run has no evaluation yet.
    """
    last: dict[str, float] = {}
    for record in read_metrics(run_dir):
        last |= {key: float(value) for key, value in record.items()}
    if not any(key.startswith("eval/") for key in last):
        raise ValueError(f"{run_dir.metrics_file} has no evaluation yet; resume the run first")
    return last


def metric_table(
    run_dir: RunDir,
) -> tuple[list[str], dict[str, dict[str, float]], dict[str, float]]:
    """Modules, their metrics (metric -> module -> value), and the losses of the last evaluation."""
    losses: dict[str, float] = {}
    per_module: dict[str, dict[str, float]] = {}
    modules: list[str] = []
    for key, value in final_metrics(run_dir).items():
        match key.split("/"):
            case ["eval", "loss", name]:
                losses[name] = value
            case ["eval", metric, module]:
                per_module.setdefault(metric, {})[module] = value
                if module not in modules:
                    modules.append(module)
    return modules, per_module, losses


def format_value(metric: str, value: float) -> str:
    return f"{value:.0f}" if metric == "identity_ci_error" else f"{value:.4g}"


def print_summary(run_dir: RunDir) -> None:
    """Losses and per-module metrics of the last evaluation, then where everything lies."""
    console = Console()
    modules, per_module, losses = metric_table(run_dir)
    # Side by side so that the result fits one look, whatever the number of metrics.
    table = Table(title=run_dir.path.name, box=box.SIMPLE_HEAD, title_style="bold")
    table.add_column("metric")
    for module in modules:
        table.add_column(module, justify="right")
    for metric, values in per_module.items():
        cells = [format_value(metric, values[m]) if m in values else "" for m in modules]
        table.add_row(metric, *cells)
    table.add_section()
    for name, value in losses.items():
        table.add_row(name, f"{value:.3e}")
    console.print(table)
    if "identity_ci_error" in per_module:
        wrong = sum(per_module["identity_ci_error"].values())
        verdict = (
            "[bold green]The known solution was found[/]: every entry is within tolerance."
            if wrong == 0
            else f"[bold yellow]The known solution was not found[/]: {wrong:.0f} entries are off."
        )
        console.print(verdict)
    console.print(f"run     {run_dir.path.resolve()}", soft_wrap=True)
    console.print(
        f"report  {run_dir.report_file.resolve()}  (open it in a browser)", soft_wrap=True
    )


def environment(run_dir: RunDir) -> dict[str, object]:
    return json.loads(run_dir.env_file.read_text())
