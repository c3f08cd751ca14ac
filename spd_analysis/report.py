"""One self-contained HTML page about a run, or about a whole launch.

    python -m spd_analysis.report RUN|LAUNCH

writes `report.html` into its folder: of a run the result, curves, figures and config; of a launch
a table of its runs, with what varies between them. What `evaluate_run`, `compare` and others found
stands in it where it is there.
"""

import argparse
import sys
from html import escape
from pathlib import Path

from spd_analysis.evaluate_run import read_evaluations
from spd_analysis.launch_report import write_launch_report
from spd_analysis.launches import find_launch
from spd_analysis.page import (
    CAPTIONS,
    analyses,
    clusterings,
    folded,
    last_figures,
    page,
    picture,
    pictures,
    section,
    svg_of,
    table,
)
from spd_analysis.summary import Tables, environment, metric_tables, tables_of, verdict
from spd_core.config import load_config
from spd_core.load import find_run
from spd_core.run_dir import RunDir, read_metrics, write_atomic
from spd_core.targets.store import describe_target


def write_report(run_dir: RunDir) -> Path:
    """Write report.html from what lies in the run's folder; returns its path.

    Raises:
        ValueError: the folder holds no evaluated run.
    """
    config = load_config(run_dir.config_file)
    result = section("Result", "", _result(metric_tables(run_dir)))
    env = environment(run_dir)
    subtitle = (
        f"{config.experiment}, seed {config.seed}, {config.train.steps:,} steps, "
        f"batch {config.train.batch_size:,}, dp {config.dp}; "
        f"torch {env['torch']} on {env['device']}; "
        f"target {describe_target(config, run_dir.targets)}"
    )
    figures, captions = last_figures(run_dir), {f"{n}.png": c for n, c in CAPTIONS.items()}
    sections = [
        result,
        *_evaluations(run_dir),
        section("Training", "", _curves(run_dir)),
        *([] if figures is None else pictures(figures, captions)),
        *(picture(file, title, shown) for title, (file, shown) in clusterings(run_dir).items()),
        *analyses(run_dir.path),
        folded("Config", run_dir.config_file.read_text()),
        folded("Environment", run_dir.env_file.read_text()),
    ]
    write_atomic(run_dir.report_file, page(run_dir.path.name, subtitle, sections, width=1060))
    return run_dir.report_file


def _result(tables: Tables) -> str:
    result = verdict(tables)
    sentence = ""
    if result is not None:
        found, text = result
        sentence = f"<p class='verdict {'good' if found else 'bad'}'>{escape(text)}</p>"
    body = "".join(table(title, rows) for title, rows in tables.items())
    return f"{sentence}<div class='tables'>{body}</div>"


def _evaluations(run_dir: RunDir) -> list[str]:
    """What `evaluate_run` found at the last of its checkpoints."""
    sections = []
    for name, e in read_evaluations(run_dir).items():
        *others, step = e.checkpoints
        also = f"; at steps {', '.join(map(str, others))} too, in evals/{name}.json"
        caption = f"step {step}, {e.steps} batches of {e.batch_size:,}{also if others else ''}"
        tables = tables_of(e.checkpoints[step])
        sections.append(section(f"Evaluation {name}", caption, _result(tables)))
    return sections


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
    return svg_of(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        "spd_analysis.report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("of", metavar="RUN|LAUNCH", help="a folder or an id; or `latest`")
    arguments = parser.parse_args()
    try:
        launch = find_launch(arguments.of)
        if launch is None:
            written = write_report(find_run(arguments.of))
        else:
            written = write_launch_report(launch)
    except ValueError as error:
        sys.exit(f"{error}")
    print(f"wrote {written}; open it in a browser")
