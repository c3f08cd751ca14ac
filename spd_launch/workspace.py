"""python -m spd_launch.workspace LAUNCH: a view in W&B of the runs of a launch, and what it sweeps.

It needs `pip install wandb-workspaces`, and one of the runs in W&B. Of a launch of several runs
that is tracked online, the first one that W&B knows saves the view by itself.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from spd_core.config import load_config
from spd_core.run_dir import write_atomic
from spd_launch import ledger
from spd_launch.errors import LaunchError, exit_with
from spd_launch.ledger import LaunchDir
from spd_launch.observe import parser
from spd_launch.run_record import read_wandb_url
from spd_launch.steps import Row

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace  # pyright: ignore[reportMissingImports]

MAX_VALUES = 12  # of one swept field, told in words


def build_view(launch: LaunchDir, entity: str, project: str) -> "Workspace":
    """The view, from the files of the launch alone: nothing is sent.

    Its runs are those of the launch (the group that W&B has them in) and the earlier ones that
    stand for runs that were left out; its columns and axes are the fields that vary.
    """
    import wandb_workspaces.reports.v2.interface as wr  # pyright: ignore[reportMissingImports]
    import wandb_workspaces.workspaces as ws  # pyright: ignore[reportMissingImports]

    rows = decompositions(launch)
    info, fields = ledger.read_info(launch), list(dict.fromkeys(k for r in rows for k in r.varies))
    group = (
        load_config(launch.run_dir(rows[0].name).config_file).track.wandb.group or launch.launch_id
    )
    runs: Any = [ws.Metric("Group") == group]
    if info["done"]:
        runs = ws.Or(*runs, ws.Metric("Name").isin(info["done"]))
    axes = [wr.Config(field) for field in fields] + [wr.SummaryMetric("loss/total")]
    columns = [wr.ParallelCoordinatesPlotColumn(metric=axis) for axis in axes]
    swept: list[Any] = [
        wr.MarkdownPanel(markdown=in_words(rows, fields, info)),
        wr.ParallelCoordinatesPlot(columns=columns, title="what is swept, and the loss"),
    ]
    curves: list[Any] = [
        wr.LinePlot(title="loss/total", y=["loss/total"], log_y=True),
        *(wr.LinePlot(title=name, metric_regex=f"{name}/.*") for name in ("loss", "eval/loss")),
        wr.LinePlot(title="eval/ci_l0", metric_regex="eval/ci_l0.*"),
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=launch.launch_id,
        sections=[
            ws.Section(name="Swept", panels=swept, is_open=True),
            ws.Section(name="Curves", panels=curves, is_open=True),
        ],
        runset_settings=ws.RunsetSettings(
            filters=runs,
            pinned_columns=[*(f"config:{field}" for field in fields), "summary:loss/total"],
        ),
    )


def in_words(rows: list[Row], fields: list[str], info: dict[str, Any]) -> str:
    """What was launched and which values each field takes, as Markdown."""
    lines = [f"**{info['launch_id']}**: {len(rows)} runs", "", f"`{info['command']}`", ""]
    lines += [f"{info['time']}, code {info['commit'] or info['python_path']}", ""]
    lines += ["| field | values |", "| --- | --- |"] if fields else []
    for field in fields:
        values = list(dict.fromkeys(str(r.varies[field]) for r in rows if field in r.varies))
        more = f", ... ({len(values)})" if len(values) > MAX_VALUES else ""
        told = ", ".join(values[:MAX_VALUES]).replace("|", "\\|")
        lines.append(f"| {field} | {told}{more} |")
    return "\n".join(lines)


def decompositions(launch: LaunchDir) -> list[Row]:
    return [row for row in ledger.read_task_rows(launch) if row.goal == "decomposition"]


def main() -> int:
    options = parser(__doc__ or "", nargs="one")
    options.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    launch, _ = ledger.find(given.launch, given.out_dir)
    file = launch.path / "wandb_view.txt"
    if given.once:
        if len(decompositions(launch)) < 2:
            return 0
        try:
            file.touch(exist_ok=False)
        except FileExistsError:  # another run has begun first
            return 0
    elif file.exists() and file.read_text():
        print(f"{file.read_text().strip()}\nto save a new one: remove {file}")
        return 0
    _save(launch, file)
    return 0


def _save(launch: LaunchDir, file: Path) -> None:
    urls = [read_wandb_url(launch.run_dir(row.name)) for row in decompositions(launch)]
    url = next(filter(None, urls), None)
    if url is None:
        raise LaunchError(
            f"W&B has no run of {launch.launch_id} yet: track.wandb.mode=online sends runs as they "
            "train, python -m spd_launch.upload RUN later"
        )
    _, entity, project, *_ = urlparse(url).path.split("/")
    try:
        view = build_view(launch, entity, project).save()
    except ImportError:
        raise LaunchError(
            "views need an optional package, which is not installed: pip install wandb-workspaces"
        ) from None
    except Exception as error:
        print(
            f"W&B failed: {type(error).__name__}: {error}\nno view was saved; to try again: "
            f"python -m spd_launch.workspace {launch.launch_id}",
            flush=True,
        )
        raise
    write_atomic(file, f"{view.url}\n")
    print(f"view    {view.url}\nresults python -m spd_launch.results {launch.launch_id}")


if __name__ == "__main__":
    exit_with(main)
