"""The short tables at the end of a run."""

import json

from rich import box
from rich.console import Console
from rich.table import Table

from spd_core.config import load_config
from spd_core.run_dir import RunDir, read_metrics
from spd_core.targets.store import describe_target

Tables = dict[str, dict[str, dict[str, float]]]
"""Title -> row -> column -> value."""


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


def metric_tables(run_dir: RunDir) -> Tables:
    """The last evaluation of training, as `tables_of` arranges it."""
    return tables_of(final_metrics(run_dir))


def tables_of(values: dict[str, float]) -> Tables:
    """An evaluation: a row per module, one per loss, and a table for each other metric."""
    tables: Tables = {"module": {}, "loss": {}}
    for key, value in values.items():
        match key.split("/"):
            case ["eval", "loss", name] | ["eval", name]:
                title, row, column = "loss", name, "value"
            case ["eval", metric, module]:
                title, row, column = "module", module, metric
            case ["eval", metric, measure, kind]:
                title, row, column = metric, kind, measure
            case _:
                continue
        tables.setdefault(title, {}).setdefault(row, {})[column] = value
    return {title: rows for title, rows in tables.items() if rows}


def format_value(column: str, value: float) -> str:
    match column:
        case "identity_ci_error" | "alive_components":
            return f"{value:.0f}"
        case "value":
            return f"{value:.3e}"
        case _:
            return f"{value:.4g}"


def verdict(tables: Tables) -> tuple[bool, str] | None:
    """Whether the known solution was found, and the sentence that says so."""
    rows = tables["module"].values() if "module" in tables else []
    errors = [row["identity_ci_error"] for row in rows if "identity_ci_error" in row]
    if not errors:
        return None
    if sum(errors) == 0:
        return True, "The known solution was found: every entry is within tolerance."
    return False, f"The known solution was not found: {sum(errors):.0f} entries are off."


def columns_of(rows: dict[str, dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows.values() for column in row))


def print_summary(run_dir: RunDir) -> None:
    """The last evaluation, then where everything lies."""
    console = Console()
    tables = metric_tables(run_dir)
    console.print(f"\n[bold]{run_dir.path.name}", highlight=False)
    for title, rows in tables.items():
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column(title)
        columns = columns_of(rows)
        for column in columns:
            table.add_column(column, justify="right")
        for name, values in rows.items():
            cells = [format_value(c, values[c]) if c in values else "" for c in columns]
            table.add_row(name, *cells)
        console.print(table)
    if (result := verdict(tables)) is not None:
        found, sentence = result
        console.print(f"[bold {'green' if found else 'yellow'}]{sentence}", highlight=False)
    target = describe_target(load_config(run_dir.config_file), run_dir.targets)
    console.print(f"target  {target}", soft_wrap=True, highlight=False)
    console.print(f"run     {run_dir.path.resolve()}", soft_wrap=True)
    console.print(
        f"report  {run_dir.report_file.resolve()}  (open it in a browser)", soft_wrap=True
    )


def environment(run_dir: RunDir) -> dict[str, object]:
    return json.loads(run_dir.env_file.read_text())


def short_names(run_ids: list[str]) -> list[str]:
    """Run ids without the parts, between hyphens, that all of them begin or end with."""
    parts = [run_id.split("-") for run_id in run_ids]
    for end in (0, -1):
        while min(map(len, parts)) > 1 and len({part[end] for part in parts}) == 1:
            for part in parts:
                part.pop(end)
    return ["-".join(part) for part in parts]
