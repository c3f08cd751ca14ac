"""The page about a launch: every run in one sortable table, and what varies between them.

Beside the table: parallel coordinates, the runs' curves, small pictures of their figures, and what
was found about the launch as a whole (`launches/ID/analysis/`).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean

import yaml

from spd_analysis.evaluate_run import read_evaluations
from spd_analysis.launches import state_of, task_rows
from spd_analysis.page import (
    CAPTIONS,
    analyses,
    clusterings,
    folded,
    image,
    last_figures,
    page,
    section,
    smaller,
    svg_of,
)
from spd_analysis.parallel import Columns, Value, parallel_coordinates
from spd_analysis.summary import final_metrics, short_names, tables_of, verdict
from spd_core.config import RunConfig, load_config
from spd_core.run_dir import RunDir, read_metrics, write_atomic

MANY_MODULES = 4  # more than these share one column of the table
N_AXES = 10
N_POINTS = 120  # of a run's curve
THUMBNAILS = 6_000_000  # bytes that all small pictures may take

STYLE = """
th { vertical-align: bottom; } .runs th { cursor: pointer; padding-right: 18px;
  font-size: 14px; line-height: 1.3; max-width: 130px; position: sticky; top: 0; background: #fff; }
.scroll { max-height: 620px; overflow: auto; }
.runs th[data-order="1"]::after { content: " \\25b2"; }
.runs th[data-order="-1"]::after { content: " \\25bc"; }
.runs td { white-space: nowrap; padding-right: 18px; font-size: 14px; }
.runs tr.on td { background: #fdf3d7; }
.lines path { fill: none; stroke-width: 1.6; opacity: .75; }
.lines path.on { stroke: #111 !important; stroke-width: 3.5; opacity: 1; }
.lines text { font-size: 11px; fill: #1d2733; }
.lines .tick { font-size: 10px; stroke: #fff; stroke-width: 4; paint-order: stroke; }
.grid { display: flex; flex-wrap: wrap; gap: 14px; }
.grid figure { margin: 0; } .grid figcaption { font-size: 12px; color: var(--quiet); }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.runs")) {
  const [head, ...rows] = table.rows;
  [...head.cells].forEach((th, column) => th.onclick = () => {
    const order = th.dataset.order === "1" ? -1 : 1;
    for (const other of head.cells) delete other.dataset.order;
    th.dataset.order = order;
    const value = row => row.cells[column].dataset.value;
    const number = row => value(row) === "" ? NaN : Number(value(row));
    rows.sort((a, b) => {
      if ((value(a) === "") !== (value(b) === "")) return value(a) === "" ? 1 : -1;
      const difference = number(a) - number(b);
      return order * (isNaN(difference) ? value(a).localeCompare(value(b)) : difference);
    });
    table.tBodies[0].append(...rows);
  });
}
for (const part of document.querySelectorAll("[data-run]")) {
  const same = document.querySelectorAll(`[data-run="${CSS.escape(part.dataset.run)}"]`);
  part.onmouseenter = () => same.forEach(other => other.classList.add("on"));
  part.onmouseleave = () => same.forEach(other => other.classList.remove("on"));
}
"""


@dataclass(frozen=True)
class Run:
    """One row: what came out of the run (empty before an evaluation), and in which of the fields
    that were asked for it differs from other runs."""

    run_dir: RunDir
    config: RunConfig
    settings: dict[str, Value]
    state: str
    values: dict[str, float]


def write_launch_report(launch: Path) -> Path:
    """Write report.html into the launch's folder; returns its path.

    Raises:
        ValueError: the launch has no decomposition, or a run's folder is gone.
    """
    runs = _read_runs(launch)
    info = yaml.safe_load((launch / "launch.yaml").read_text())
    names = short_names([run.run_dir.path.name for run in runs])
    settings = _settings(runs)
    results = _columns([run.values for run in runs], runs[0].config)
    states: Columns = {"state": [run.state for run in runs]}
    table = _table(runs, names, states | settings | results)
    caption = (
        "What varies, and the last evaluation of training. Click a column to sort by it; "
        "a run's name leads to its own report."
    )
    sections = [
        section("Runs", caption, _verdicts(runs) + table),
        *_evaluations(runs, names, settings),
        *_parallel(runs, settings | results),
        section("Training", "", _curves(runs, names)),
        *analyses(launch),
        *_thumbnails(runs, names),
        folded(f"Config of {runs[0].run_dir.path.name}", runs[0].run_dir.config_file.read_text()),
    ]
    counts = Counter(run.state for run in runs)
    came = ", ".join(f"{n} {state}" for state, n in counts.items())
    subtitle = f"{len(runs)} runs ({came}) of {info['time']}; {info['command']}"
    text = page(launch.name, subtitle, sections, 1240, STYLE, SCRIPT)
    write_atomic(launch / "report.html", text)
    return launch / "report.html"


def _read_runs(launch: Path) -> list[Run]:
    runs = []
    for row in task_rows(launch):
        if row["goal"] == "decomposition":
            run_dir = RunDir(launch.parent.parent / "runs" / row["run_id"])
            try:
                values = final_metrics(run_dir)
            except ValueError:  # not evaluated yet: its row stays empty
                values = {}
            config = load_config(run_dir.config_file)
            typed = {"experiment", "seed", *row["overrides"]}
            settings: dict[str, Value] = {
                field: value if isinstance(value, int | float | str | None) else str(value)
                for field, value in row["varies"].items()
                if any(field == key or field.startswith(f"{key}.") for key in typed)
            }
            runs.append(Run(run_dir, config, settings, state_of(run_dir), values))
    if not runs:
        raise ValueError(f"{launch} trained targets only: there is no decomposition to look at")
    return runs


def _settings(runs: Sequence[Run]) -> Columns:
    fields = dict.fromkeys(field for run in runs for field in run.settings)
    return {field: [run.settings.get(field) for run in runs] for field in fields}


def _columns(values: Sequence[dict[str, float]], config: RunConfig) -> Columns:
    """The metrics of several evaluations: column -> value of each, None where it has none.

    A metric of many modules is one column, their mean; groups of modules have their own.
    """
    names: dict[str, list[str]] = {}
    by_module: dict[str, list[str]] = {}
    l0 = config.eval.metrics.ci_l0
    for key in dict.fromkeys(key for of_run in values for key in of_run):
        match key.split("/"):
            case ["eval", "loss", name] | ["eval", name]:
                names[name] = [key]
            case ["eval", metric, _]:
                by_module.setdefault(metric, []).append(key)
            case ["eval", *path]:
                names[" ".join(path)] = [key]
    for metric, keys in by_module.items():
        groups = [] if l0 is None else [k for k in keys if k.split("/")[-1] in l0.groups]
        modules = [k for k in keys if k not in groups]
        for key in keys if len(modules) <= MANY_MODULES else groups:
            names[f"{metric} {key.split('/')[-1]}"] = [key]
        if len(modules) > MANY_MODULES:
            names[f"{metric}, mean of {len(modules)} modules"] = modules
    return {
        name: [mean(v[k] for k in keys) if keys[0] in v else None for v in values]
        for name, keys in names.items()
    }


def _table(runs: Sequence[Run], names: Sequence[str], columns: Columns) -> str:
    # A long name may break after an underscore, or a dot that is no decimal point.
    heads = [re.sub(r"(_|\.(?=[a-z]))", r"\1<wbr>", escape(name)) for name in columns]
    head = "".join(f"<th>{name}</th>" for name in ["run", *heads])
    body = ""
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        run_id = run.run_dir.path.name
        link = f"<a href='../../runs/{escape(run_id)}/report.html'>{escape(name)}</a>"
        body += f"<tr data-run='{escape(run_id)}'><td data-value='{escape(name)}'>{link}</td>"
        for values in columns.values():
            sortable = "" if values[i] is None else escape(str(values[i]))
            body += f"<td data-value='{sortable}'>{escape(_shown(values[i]))}</td>"
        body += "</tr>"
    table = f"<table class='runs'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll'>{table}</div>"


def _shown(value: Value) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)


def _verdicts(runs: Sequence[Run]) -> str:
    found = [v for run in runs if (v := verdict(tables_of(run.values))) is not None]
    if not found:
        return ""
    n = sum(solved for solved, _ in found)
    kind = "good" if n == len(found) else "bad"
    return (
        f"<p class='verdict {kind}'>The known solution was found by {n} of {len(found)} runs.</p>"
    )


def _evaluations(runs: Sequence[Run], names: Sequence[str], settings: Columns) -> list[str]:
    """A table for every name under which `evaluate_run` looked at all runs or some."""
    of_runs = [read_evaluations(run.run_dir) for run in runs]
    sections = []
    for name in dict.fromkeys(name for of_run in of_runs for name in of_run):
        found = [of_run[name] for of_run in of_runs if name in of_run]
        values = [
            of_run[name].checkpoints[max(of_run[name].checkpoints)] if name in of_run else {}
            for of_run in of_runs
        ]
        sizes = {f"{e.steps} batches of {e.batch_size:,}" for e in found}
        columns = settings | _columns(values, runs[0].config)
        caption = f"The last checkpoint of each run on {' or '.join(sorted(sizes))}."
        table = _table(runs, names, columns)
        sections.append(section(f"Evaluation {name}", caption, table))
    return sections


def _parallel(runs: Sequence[Run], columns: Columns) -> list[str]:
    varying = {n: v for n, v in columns.items() if len({x for x in v if x is not None}) > 1}
    if len(varying) < 2:
        return []
    axes = dict(list(varying.items())[:N_AXES])
    losses = [name for name in axes if name.startswith("stochastic_recon")]
    color_by = losses[0] if losses else list(axes)[-1]
    more = f" (the first {N_AXES} of {len(varying)})" if len(varying) > N_AXES else ""
    caption = f"A line per run through the columns that vary{more}, blue to red by {color_by}."
    svg = parallel_coordinates([run.run_dir.path.name for run in runs], axes, color_by)
    return [section("What goes with what", caption, svg)]


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    """The total loss and the active subcomponents of every run, each in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
    colors = plt.get_cmap("viridis" if len(runs) > 10 else "tab10")
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        color = colors(i / len(runs)) if len(runs) > 10 else colors(i)
        records = read_metrics(run.run_dir)
        for ax, prefix in ((left, "loss/total"), (right, "ci_l0")):
            points = [
                (record["step"], mean(float(v) for k, v in record.items() if k.startswith(prefix)))
                for record in records if any(key.startswith(prefix) for key in record)
            ]  # fmt: skip
            thinned = points[:: -(-len(points) // N_POINTS) or 1]
            ax.plot(*zip(*thinned, strict=True) if thinned else ([], []),
                    color=color, linewidth=1.2, label=name)  # fmt: skip
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    left.set(yscale="log", title="total loss")
    right.set(ylim=(0, None), title="ci_l0, mean over modules")
    if len(runs) <= 10:
        right.legend(frameon=False, fontsize=8)
    return svg_of(figure)


def _thumbnails(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Small pictures of the runs' last figures, kind after kind while the page has room."""
    kinds: dict[str, tuple[str, dict[int, Path]]] = {}  # title -> what it shows, file of each run
    for i, run in enumerate(runs):
        figures = last_figures(run.run_dir)
        files = {t: (figures / f"{n}.png", c) for n, (t, c) in CAPTIONS.items() if figures}
        for title, (file, caption) in (files | clusterings(run.run_dir)).items():
            if file.exists():
                kinds.setdefault(title, (caption, {}))[1][i] = file
    width = 580 if len(runs) <= 6 else 380  # two or three in a row
    sections, used, left_out = [], 0, []
    for title, (caption, files) in kinds.items():
        small = {i: smaller(file, width, colors=32) for i, file in files.items()}
        used += sum(map(len, small.values()))
        if used > THUMBNAILS:
            left_out.append(title)
            continue
        cells = ""
        for i, png in small.items():
            below = f"<figcaption>{escape(names[i])}</figcaption>"
            cells += f"<figure>{image(png, names[i])}{below}</figure>"
        sections.append(section(title, caption, f"<div class='grid'>{cells}</div>"))
    if left_out:
        text = (
            f"Left out, to keep the page small: {', '.join(left_out)}. The runs' reports hold them."
        )
        sections.append(f"<p class='quiet'>{escape(text)}</p>")
    return sections
