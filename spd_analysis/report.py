"""One self-contained HTML page per run: result, curves, figures, config.

`python -m spd_analysis.report RUN_FOLDER` writes `report.html` into the run's folder.
"""

import argparse
import base64
import io
import sys
from html import escape
from pathlib import Path
from string import Template

from spd_analysis.summary import columns_of, environment, format_value, metric_tables, verdict
from spd_core.config import load_config
from spd_core.run_dir import RunDir, read_metrics, write_atomic
from spd_core.targets.store import describe_target

CAPTIONS = {
    "permuted_ci_plots": (
        "Causal importances of single features",
        "Each row is one input feature, alone and at 0.75. Columns are subcomponents, reordered "
        "towards the diagonal. A clean diagonal and nothing else: one subcomponent per feature.",
    ),
    "uv_plots": (
        "Subcomponents against the target weight",
        "V reads from the module's input, U writes to its output; the sum of all rank-one "
        "subcomponents must give back the target weight on the right.",
    ),
    "ci_histograms": (
        "Distribution of causal importances",
        "Over all positions and subcomponents. Most are zero; what matters should be near one.",
    ),
    "component_activation_density": (
        "Activation density",
        "How often each subcomponent is causally important. Those at the floor are never needed.",
    ),
    "ci_mean_per_component": (
        "Mean causal importance",
        "Averaged over positions, subcomponents sorted.",
    ),
}

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$name</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { --ink: #1d2733; --quiet: #66727f; --line: #e3e8ed; --good: #1c7a4c; --bad: #a65b00; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: #f6f8fa; margin: 0; }
main { max-width: 1060px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 0 0 6px; }
p { margin: 0 0 12px; } .quiet { color: var(--quiet); font-size: 14px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin-top: 20px; overflow-x: auto; }
img, svg { max-width: 100%; height: auto; display: block; margin: 0 auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 22px 5px 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--quiet); font-weight: 600; }
.tables { display: flex; gap: 56px; flex-wrap: wrap; align-items: flex-start; }
.verdict { font-weight: 600; font-size: 18px; }
.good { color: var(--good); } .bad { color: var(--bad); }
pre { font-size: 13px; overflow-x: auto; margin: 8px 0 0; }
summary { cursor: pointer; font-weight: 600; }
</style></head><body><main>
<h1>$name</h1><p class="quiet">$subtitle</p>
$result
$curves
$figures
<section><details><summary>Config</summary><pre>$config</pre></details></section>
<section><details><summary>Environment</summary><pre>$environment</pre></details></section>
</main></body></html>
""")


def write_report(run_dir: RunDir) -> Path:
    """Write report.html from what lies in the run's folder; returns its path.

    Raises:
        ValueError: the folder holds no evaluated run.
    """
    config = load_config(run_dir.config_file)
    result = _result(run_dir)
    env = environment(run_dir)
    subtitle = (
        f"{config.experiment}, seed {config.seed}, {config.train.steps:,} steps, "
        f"batch {config.train.batch_size:,}, dp {config.dp}; "
        f"torch {env['torch']} on {env['device']}; "
        f"target {describe_target(config, run_dir.targets)}"
    )
    page = PAGE.substitute(
        name=escape(run_dir.path.name),
        subtitle=escape(subtitle),
        result=result,
        curves=f"<section><h2>Training</h2>{_curves(run_dir)}</section>",
        figures=_figures(run_dir),
        config=escape(run_dir.config_file.read_text()),
        environment=escape(run_dir.env_file.read_text()),
    )
    write_atomic(run_dir.report_file, page)
    return run_dir.report_file


def _result(run_dir: RunDir) -> str:
    tables = metric_tables(run_dir)
    result = verdict(tables)
    sentence = ""
    if result is not None:
        found, text = result
        sentence = f"<p class='verdict {'good' if found else 'bad'}'>{text}</p>"
    body = "".join(_table(title, rows) for title, rows in tables.items())
    return f"<section><h2>Result</h2>{sentence}<div class='tables'>{body}</div></section>"


def _table(title: str, rows: dict[str, dict[str, float]]) -> str:
    columns = columns_of(rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in [title, *columns])
    body = ""
    for name, values in rows.items():
        cells = [format_value(c, values[c]) if c in values else "" for c in columns]
        body += f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _curves(run_dir: RunDir) -> str:
    """Losses and, beside them, how many subcomponents are active."""
    # Imported here: matplotlib takes long, and printing a summary does not need it.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_metrics(run_dir)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for prefix, ax in {"loss/": left, "ci_l0": right}.items():
        for key in dict.fromkeys(k for r in records for k in r if k.startswith(prefix)):
            points = [(r["step"], r[key]) for r in records if key in r]
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) < 30 else None
            ax.plot(steps, values, label=key.split("/")[-1], linewidth=1.5, marker=marker, ms=3)
        ax.set_xlabel("step")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if ax.lines:
            ax.legend(frameon=False, fontsize=9)
    left.set(yscale="log", title="losses")
    right.set(ylim=(0, None), title="ci_l0: subcomponents active per position")
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    plt.close(figure)
    text = svg.getvalue()
    return text[text.index("<svg") :]


def _figures(run_dir: RunDir) -> str:
    """The figures of the last step that has any, embedded."""
    folders = sorted(run_dir.figures.glob("step_*"), key=lambda p: int(p.name.split("_")[1]))
    if not folders:
        return ""
    sections = ""
    for path in sorted(folders[-1].glob("*.png"), key=_figure_order):
        title, caption = CAPTIONS.get(path.stem, (path.stem, ""))
        data = base64.b64encode(path.read_bytes()).decode()
        sections += (
            f"<section><h2>{escape(title)}</h2><p class='quiet'>{escape(caption)}</p>"
            f"<img alt='{escape(title)}' src='data:image/png;base64,{data}'></section>"
        )
    return sections


def _figure_order(path: Path) -> tuple[int, str]:
    known = list(CAPTIONS)
    return (known.index(path.stem) if path.stem in known else len(known), path.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, for example outputs/runs/NAME")
    arguments = parser.parse_args()
    try:
        written = write_report(RunDir(arguments.run))
    except ValueError as error:
        sys.exit(f"{error}")
    print(f"wrote {written}; open it in a browser")
