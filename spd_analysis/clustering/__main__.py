"""Group the subcomponents of a finished run by minimum description length.

    python -m spd_analysis.clustering RUN [--name NAME] [--config FILE] [FIELD=VALUE ...]

writes `clusterings/NAME/` into the run's folder: history.npz and history.json (docs/clustering.md
says how to read them) and clustering.png. Fields are those of spd_analysis/clustering/config.py,
for example seed=1 alpha=0.5 'modules=["*mlp*"]' 'draw={kind: mcmc, temperature: 0.01}'.
"""

import sys
from pathlib import Path
from typing import Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from spd_analysis import command
from spd_analysis.clustering.activations import Activations, collect
from spd_analysis.clustering.config import DEFAULT, ClusteringConfig, load_config
from spd_analysis.clustering.cost import rank
from spd_analysis.clustering.figures import draw_clustering
from spd_analysis.clustering.history import History, Source, load, members, save
from spd_analysis.clustering.known import features_found, features_joined, modules_held
from spd_analysis.clustering.merge import cluster
from spd_analysis.launches import rewritten
from spd_analysis.observe import load_decomposition
from spd_core.data.batches import n_features
from spd_core.load import find_run
from spd_core.metrics import matching
from spd_core.metrics.solutions import single_feature_ci
from spd_core.run_dir import RunDir

Device = Literal["auto", "cpu", "cuda"]
MOST_ROWS, MOST_NAMES = 30, 8


def cluster_run(
    run_dir: RunDir, name: str, config: ClusteringConfig, device: Device, console: Console
) -> Path:
    """Cluster and write; one that is there already, of the same config, is left as it is.

    Raises:
        ValueError: the run cannot be loaded, nothing is alive, or another clustering has the name.
    """
    folder = run_dir.path / "clusterings" / name
    if folder.exists():
        if load(folder)[2] != config:
            raise ValueError(f"{folder} is another clustering: give this one another --name")
        console.print(f"{folder} is there already", soft_wrap=True, highlight=False)
        return folder
    d, step = load_decomposition(run_dir, device)
    with console.status(f"causal importances on {config.data.n_samples:,} samples"):
        activations = collect(d, config)
    n = len(activations.subcomponents)
    console.print(
        f"{n} of {n + activations.n_dead} subcomponents are alive on "
        f"{activations.n_samples:,} samples"
    )
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("merge", total=config.iters or n - 1)
        history = cluster(activations, config, lambda _k: progress.advance(bar))
    source = Source(
        run_dir.path.name, step, activations.n_samples, activations.n_dead,
        activations.subcomponents,
    )  # fmt: skip
    with rewritten(folder) as new:  # another task may have written the same meanwhile
        save(new, history, source, config)
        title = f"{run_dir.path.name}, step {step}: clustering {name}"
        draw_clustering(history, activations, title, new / "clustering.png")
    print_groups(history, activations, config.alpha, console)
    if d.config.data.kind == "sparse_features":
        ci = single_feature_ci(d.model, n_features(d.config))
        ci = {name: ci[name].cpu().numpy() for name in matching(list(ci), config.modules)}
        (labels,) = history.labels(n, np.array([history.best]))
        held = modules_held(ci, activations.subcomponents, labels)
        console.print(
            f"{features_found(held, len(ci)).sum()} of {len(held)} features have a group of their "
            f"own that holds a subcomponent of theirs of every module ({', '.join(ci)}); "
            f"{features_joined(held, len(ci)).sum()} have one that may be of other features too"
        )
    return folder


def print_groups(
    history: History, activations: Activations, alpha: float, console: Console
) -> None:
    """The groups of several members at the lowest cost, then the cost along the merge."""
    n, best = len(activations.subcomponents), history.best
    (labels,) = history.labels(n, np.array([best]))
    several = [group for group in members(labels) if len(group) > 1]
    table = Table(
        title=f"{len(several)} groups with several members, of {history.n_groups[best]}",
        title_justify="left", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    table.add_column("members", justify="right")
    table.add_column("active", justify="right")
    table.add_column("bits per sample", justify="right")
    table.add_column("subcomponents", overflow="fold")
    for group in several[:MOST_ROWS]:
        union = activations.union(activations.values[:, group])
        s = activations.total(union[:, None])[0] / activations.n_samples
        bits = s * (np.log2(history.n_groups[best]) + alpha * rank(np.array(len(group))))
        names = [activations.subcomponents[i] for i in group[:MOST_NAMES]]
        more = f" and {len(group) - MOST_NAMES} more" if len(group) > MOST_NAMES else ""
        table.add_row(str(len(group)), f"{s:.2%}", f"{bits:.4f}", ", ".join(names) + more)
    console.print(table)
    if len(several) > MOST_ROWS:
        console.print(f"and {len(several) - MOST_ROWS} more groups")
    curve = Table(title="cost along the merge", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("iteration", "groups", "bits per sample"):
        curve.add_column(column, justify="right")
    for at in sorted({*np.linspace(0, history.iters, 9).astype(int).tolist(), best}):
        style = "bold" if at == best else ""
        curve.add_row(str(at), str(history.n_groups[at]), f"{history.cost[at]:.4f}", style=style)
    console.print(curve)


def _name(text: str) -> str:
    """NAME, or ENSEMBLE/NAME."""
    return "/".join(map(command.name, text.split("/", maxsplit=1)))


@command.errors_are_told
def main() -> int:
    parser = command.parser("spd_analysis.clustering", __doc__)
    parser.add_argument("run", metavar="RUN", help="folder or id of a run; or a W&B run")
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE")
    parser.add_argument(
        "--name", type=_name, default="default", help="of the results; default: default"
    )
    parser.add_argument("--config", type=Path, default=DEFAULT, metavar="FILE", help="a YAML file")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    given = parser.parse_intermixed_args()
    console = Console()
    config, run_dir = load_config(given.config, given.overrides), find_run(given.run)
    folder = cluster_run(run_dir, given.name, config, given.device, console)
    console.print(
        f"wrote {folder}: look at clustering.png\n"
        f"next: python -m spd_launch +pipeline=clustering run={given.run} n=8\n"
        "      (the same on other data and draws: do the groups hold?)",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
