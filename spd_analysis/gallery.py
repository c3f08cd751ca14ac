"""The solved experiments on one page, from real runs: docs/gallery.md and its pictures.

    python -m spd_analysis.gallery RUN_FOLDER [RUN_FOLDER ...] [--out docs/gallery.md]

Runs of one experiment share a section: a table with a row per seed, and the main figures of the
seed that comes first. Sections of other experiments that the page has already stay as they are.
"""

import argparse
import shutil
import sys
from pathlib import Path
from statistics import mean

from spd_analysis.page import CAPTIONS
from spd_analysis.summary import environment, metric_tables, verdict
from spd_core.config import RunConfig, load_config
from spd_core.run_dir import RunDir, read_metrics, write_atomic

FIGURES = ("permuted_ci_plots", "uv_plots", "ci_histograms")
COLUMNS = ("identity_ci_error", "mmcs", "ml2r")
HEAD = """# Gallery

What the shipped experiments find, seed by seed. This page is written from the folders of finished
runs by `just gallery RUN_FOLDER ...`; every number on it stands in those runs' `metrics.jsonl`.
"""


def write_gallery(runs: list[RunDir], page: Path) -> None:
    """Write the page, and copies of the figures into a folder beside it named as the page.

    Raises:
        ValueError: a folder holds no finished run, or two are the same seed of an experiment.
    """
    by_experiment: dict[str, dict[int, RunDir]] = {}
    for run_dir in runs:
        config, records = load_config(run_dir.config_file), read_metrics(run_dir)
        if not records or records[-1]["step"] != config.train.steps:
            raise ValueError(f"{run_dir.path} has not finished: python -m spd_launch.status")
        seeds = by_experiment.setdefault(config.experiment, {})
        if config.seed in seeds:
            raise ValueError(
                f"{seeds[config.seed].path} and {run_dir.path} are both seed {config.seed} of "
                f"{config.experiment}; give one of them"
            )
        seeds[config.seed] = run_dir
    pictures = page.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    there = page.read_text().split("\n## ")[1:] if page.exists() else []
    sections = {text.split("\n")[0]: f"## {text.rstrip()}\n" for text in there}
    for experiment, seeds in by_experiment.items():
        first = seeds[min(seeds)]
        config = load_config(first.config_file)
        parts = [_section(experiment, seeds, config)]
        for name in FIGURES:
            picture = first.figures / f"step_{config.train.steps}" / f"{name}.png"
            copy = pictures / f"{experiment}-{name}.png"
            copy.unlink(missing_ok=True)
            if picture.exists():
                shutil.copyfile(picture, copy)
                title, caption = CAPTIONS[name]
                parts.append(f"![{title}]({pictures.name}/{copy.name})\n\n*{title}.* {caption}\n")
        sections[experiment] = "\n".join(parts)
    write_atomic(page, "\n".join([HEAD, *(sections[name] for name in sorted(sections))]))


def _section(experiment: str, runs: dict[int, RunDir], config: RunConfig) -> str:
    rows, n_solved, seconds = [], 0, []
    for seed, run_dir in sorted(runs.items()):
        tables = metric_tables(run_dir)
        n_solved += (verdict(tables) or (False, ""))[0]
        seconds.append(_training_seconds(run_dir, config))
        for module, values in tables["module"].items():
            cells = [f"{values[c]:.4g}" if c in values else "" for c in COLUMNS]
            rows.append(f"| {seed} | `{module}` | {' | '.join(cells)} |")
    host = environment(runs[min(runs)])
    solved = f"Known solution found on {n_solved} of {len(runs)} seeds. " if n_solved else ""
    return "\n".join([
        f"## {experiment}\n",
        f"{solved}{config.train.steps:,} steps of {config.train.batch_size:,} examples, "
        f"{mean(seconds) / 60:.0f} minutes each on {host['n_threads']} thread(s) of "
        f"{host['device']}.\n",
        f"| seed | module | {' | '.join(COLUMNS)} |",
        f"| --- | --- |{' ---: |' * len(COLUMNS)}",
        *rows,
        "",
    ])  # fmt: skip


def _training_seconds(run_dir: RunDir, config: RunConfig) -> float:
    """Of all steps, at the rate of those that are logged."""
    rates = [float(r["examples_per_s"]) for r in read_metrics(run_dir) if "examples_per_s" in r]
    if not rates:
        raise ValueError(f"{run_dir.metrics_file} logs no examples per second; is it a toy run?")
    return config.train.steps * config.train.batch_size * mean(1 / rate for rate in rates)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--out", type=Path, default=Path("docs/gallery.md"), help="the page")
    arguments = parser.parse_args()
    try:
        write_gallery([RunDir(path) for path in arguments.runs], arguments.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.out} and its pictures; open it in an editor that shows Markdown")
    return 0


if __name__ == "__main__":
    sys.exit(main())
