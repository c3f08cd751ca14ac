"""python -m spd_launch.results LAUNCH ...: what varies between runs, and what came out.

The table shows the config values in which the runs differ, and some of their last metrics; --csv
and --parquet write all metrics, for every run. Only the ends of the runs' metrics.jsonl are read.
"""

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from spd_core.config import load_config
from spd_core.run_dir import RunDir
from spd_launch import ledger
from spd_launch.errors import LaunchError, exit_with, nearest
from spd_launch.ledger import LaunchDir
from spd_launch.observe import parser
from spd_launch.pace import last_records
from spd_launch.run_record import read_status
from spd_launch.table import print_table, short

TAIL = 32_768
SHOWN = ("eval/loss/*", "eval/ci_l0*", "eval/identity_ci_error/*")
Result = dict[str, Any]


def main() -> int:
    given = _parser().parse_args()
    results = read_results([ledger.find(name, given.out_dir) for name in given.launches])
    metric = given.lowest or given.highest
    if metric is not None:
        results = best(results, metric, "lowest" if given.lowest else "highest")
    results = results[: given.top]
    columns = list(dict.fromkeys(key for result in results for key in result))
    for file, write in ((given.csv, write_csv), (given.parquet, write_parquet)):
        if file is not None:
            write(file, columns, results)
            print(f"wrote {len(results)} run(s) and {len(columns)} columns to {file}")
    if given.csv is None and given.parquet is None:
        patterns = given.metrics or SHOWN
        _print(results, columns, [*patterns, *([metric] if metric else [])])
    return 0


def _parser() -> argparse.ArgumentParser:
    options = parser(__doc__ or "", nargs="+")
    which = options.add_mutually_exclusive_group()
    which.add_argument("--lowest", metavar="METRIC", help="the runs where it is lowest come first")
    which.add_argument("--highest", metavar="METRIC")
    options.add_argument("--top", type=int, metavar="N", help="only so many runs")
    options.add_argument(
        "--metrics", nargs="+", metavar="PATTERN",
        help=f"which metrics the table shows; default: {' '.join(SHOWN)}",
    )  # fmt: skip
    options.add_argument("--csv", type=Path, metavar="FILE")
    options.add_argument("--parquet", type=Path, metavar="FILE")
    return options


def read_results(launches: Sequence[tuple[LaunchDir, str | None]]) -> list[Result]:
    """Of each decomposition, or the one that is named: run, state, the config values that vary
    between all of them, and its last metrics. Runs that had finished before are among them."""
    configs: dict[str, dict[str, Any]] = {}
    folders: dict[str, RunDir] = {}
    for launch, run in launches:
        rows = [row for row in ledger.read_task_rows(launch) if row.goal == "decomposition"]
        done = ledger.read_info(launch)["done"]
        shared: dict[str, Any] = {}
        if rows and (len(launches) > 1 or done):  # else it is written down what varies
            first = _flat_config(launch.run_dir(rows[0].name))
            shared = {key: value for key, value in first.items() if key not in rows[0].varies}
        found = {row.name: shared | row.varies for row in rows if run in (None, row.name)}
        if run is None:
            found |= {name: _flat_config(launch.run_dir(name)) for name in done}
        configs |= found
        folders |= {name: launch.run_dir(name) for name in found}
    differences = dict(zip(configs, ledger.varying([*configs.values()]), strict=True))
    return [
        {"run": name, **{k: str(v) if isinstance(v, list) else v for k, v in varies.items()}}
        | _last_metrics(folders[name])
        for name, varies in differences.items()
    ]


def _flat_config(folder: RunDir) -> dict[str, Any]:
    return ledger.flat(load_config(folder.config_file))


def _last_metrics(folder: RunDir) -> Result:
    status, metrics = read_status(folder), {}
    for record in last_records(folder.metrics_file, TAIL):
        metrics |= record
    metrics.pop("time", None)
    return {"state": status.state if status else "no status", **metrics}


def best(results: Sequence[Result], metric: str, order: str) -> list[Result]:
    """The runs by a metric, those that have no value of it last.

    Raises:
        LaunchError: no run has this metric.
    """
    names = {key for result in results for key, v in result.items() if isinstance(v, float)}
    if metric not in names:
        raise LaunchError(f"no run has a metric {metric!r}{nearest(metric, names)}")
    sign = {"lowest": 1, "highest": -1}[order]

    def key(result: Result) -> float:
        value = result.get(metric, math.nan)
        return math.inf if math.isnan(value) else sign * value

    return sorted(results, key=key)


def write_csv(file: Path, columns: Sequence[str], results: Sequence[Result]) -> None:
    with open(file, "w", newline="") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        writer.writerows(results)


def write_parquet(file: Path, columns: Sequence[str], results: Sequence[Result]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise LaunchError("--parquet needs pyarrow: `pip install pyarrow`, or use --csv") from None
    data: dict[str, list[Any]] = {}
    for name in columns:
        values = [result.get(name) for result in results]
        kinds = {type(value) for value in values if value is not None}
        mixed = len(kinds) > 1 and not kinds <= {int, float}
        data[name] = [None if v is None else str(v) for v in values] if mixed else values
    pq.write_table(pa.table(data), file)


def _print(results: Sequence[Result], columns: Sequence[str], patterns: Sequence[str]) -> None:
    fixed = columns[: columns.index("state") + 1] if results else []
    chosen = [c for c in columns if any(fnmatchcase(c, pattern) for pattern in patterns)]
    header = [*fixed, *(name.removeprefix("eval/") for name in chosen)]
    print_table(header, [[_cell(r, c) for c in [*fixed, *chosen]] for r in results])
    n_left = sum(1 for c in columns if c not in fixed and c not in chosen)
    print(f"\n{n_left} more metrics: --metrics PATTERN ..., or all of them: --csv FILE")


def _cell(result: Mapping[str, Any], name: str) -> str:
    value = result.get(name)
    if value is None:
        return ""
    return short(value) if isinstance(value, float) else str(value)


if __name__ == "__main__":
    exit_with(main)
