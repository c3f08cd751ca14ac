"""How alike decompositions of one target are: do other seeds find the same subcomponents?

    python -m spd_analysis.compare LAUNCH|RUN RUN ... [--density 0.001] [--importance 0.1]

For every pair of runs and every module: the similarity of two subcomponents is the absolute cosine
between them as rank-one matrices; each subcomponent has its best counterpart in the other run (mean
over one run's, in both directions), and one-to-one there is a best matching. Only subcomponents
that are alive count: whose causal importance is above --importance at more than a share --density
of the positions of the run's own evaluation data. Writes summary.json and pictures.
"""

import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from spd_analysis import command
from spd_analysis.launches import analysis_folder, rewritten, with_checkpoints
from spd_analysis.summary import short_names
from spd_core import distributed
from spd_core.component_model import ComponentModel
from spd_core.data.batches import Decomposition, evaluation_batch
from spd_core.distributed import Dist
from spd_core.load import LoadedRun, load_run
from spd_core.metrics import Sums, add
from spd_core.metrics.ci import component_sums
from spd_core.run_dir import RunDir
from spd_core.targets.store import describe_target

CAPTIONS = {
    "similarity.png": (
        "Similarity of the decompositions",
        "Left: the subcomponents of the row's run, each with its best counterpart in the column's. "
        "Right: in the best one-to-one matching. 1 = the same directions; means over modules.",
    ),
    "modules.png": (
        "Similarity by module",
        "Each dot is a pair of runs: mean similarity to the best counterpart, in both directions, "
        "and in the best one-to-one matching.",
    ),
}


@dataclass(frozen=True)
class Subcomponents:
    """Some subcomponents of one module: the rank-one matrices V[:, c] U[c, :]."""

    V: Float[Tensor, "d_in C"]
    U: Float[Tensor, "C d_out"]

    @property
    def C(self) -> int:
        return self.V.shape[1]


@dataclass(frozen=True)
class Similarity:
    """How alike two sets of subcomponents are, from 0 to 1.

    `to_second` is the mean over the first's subcomponents of the similarity to their best
    counterpart in the second, `to_first` the other way round, and `matched` the mean over `pairs`,
    the best one-to-one matching. All three are None where one of the sets is empty.
    """

    to_second: float | None
    to_first: float | None
    matched: float | None
    pairs: list[tuple[int, int]]


def cosines(first: Subcomponents, second: Subcomponents) -> Float[Tensor, "C_first C_second"]:
    """|cos(V_i, V_j) cos(U_i, U_j)|, the absolute cosine between rank-one matrices as vectors.

    It knows no sign or length; a subcomponent of length zero is like no other.
    """
    result = _unit(first.V.T) @ _unit(second.V.T).T
    return result.mul_(_unit(first.U) @ _unit(second.U).T).abs_()


def _unit(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    # First by the largest entry: the square of a small number is no float32.
    rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return torch.nn.functional.normalize(rows, dim=1)


def similarity(first: Subcomponents, second: Subcomponents) -> Similarity:
    """Compare two sets of subcomponents of one module; the largest array is C_first x C_second."""
    if not (first.C and second.C):
        return Similarity(None, None, None, [])
    matrix = cosines(first, second)
    rows, columns = linear_sum_assignment(matrix.numpy(), maximize=True)
    return Similarity(
        to_second=matrix.amax(1).mean().item(),
        to_first=matrix.amax(0).mean().item(),
        matched=matrix[rows, columns].mean().item(),
        pairs=list(zip(rows.tolist(), columns.tolist(), strict=True)),
    )


# ---------------------------------------------------------------- runs


@torch.no_grad()
def activation_densities(
    run: LoadedRun, data: Path, n_batches: int, importance: float, dist: Dist
) -> dict[str, Float[Tensor, "C"]]:
    """Share of positions at which each subcomponent's causal importance is above `importance`.

    On the first batches of the run's own evaluation data.
    """
    d, sums = Decomposition(run.config, run.model.to(dist.device), dist, data), Sums()
    with d.autocast():
        for i in range(n_batches):
            counts = component_sums(evaluation_batch(d, i, "eval").ci, importance)
            add(sums, {name: count.double().cpu() for name, count in counts.items()})
    return {name: count[:-1] / count[-1] for name, count in sums.items()}


def target_digest(model: ComponentModel) -> str:
    """Of the target's weights: config and name do not tell whether two targets are the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.target.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class Settings:
    """What counts as alive; `n_batches=None` is the run's eval.steps."""

    importance: float
    density: float
    n_batches: int | None


def compare_runs(runs: Sequence[RunDir], settings: Settings, dist: Dist) -> dict[str, Any]:
    """The content of summary.json. Its matrices are run by run; null = a run has none alive.

    In `to_column` the row's subcomponents look for their best counterparts in the column's run.
    Of every run only the subcomponents that are alive are kept in memory.

    Raises:
        ValueError: fewer than two runs, different targets, no module in common, or a run cannot
            be loaded.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs two runs or more, and here is {len(runs)}")
    alive: list[dict[str, Subcomponents]] = []
    digests: dict[str, RunDir] = {}
    for run_dir in runs:
        run = load_run(run_dir.path)
        digests.setdefault(target_digest(run.model), run_dir)
        if len(digests) > 1:
            raise _different_targets(next(iter(digests.values())), run_dir)
        n_batches = settings.n_batches or run.config.eval.steps
        densities = activation_densities(run, run_dir.data, n_batches, settings.importance, dist)
        alive.append({
            name: Subcomponents(
                c.V.detach().cpu()[:, densities[name] > settings.density],
                c.U.detach().cpu()[densities[name] > settings.density],
            )
            for name, c in run.model.components.items()
        })  # fmt: skip
    shared = [name for name in alive[0] if all(name in modules for modules in alive)]
    if not shared:
        of_run = [f"{r.path.name}: {', '.join(m)}" for r, m in zip(runs, alive, strict=True)]
        raise ValueError(f"the runs have no module in common; {'; '.join(of_run)}")
    modules = {name: _matrices([of[name] for of in alive]) for name in shared}
    return {
        "runs": [run_dir.path.name for run_dir in runs],
        "target": next(iter(digests)),
        "importance_threshold": settings.importance,
        "density_threshold": settings.density,
        "steps": settings.n_batches,
        "alive": {name: [of[name].C for of in alive] for name in shared},
        "left_out": sorted({name for of in alive for name in of} - set(shared)),
        "to_column": _mean([m["to_column"] for m in modules.values()]),
        "matched": _mean([m["matched"] for m in modules.values()]),
        "modules": modules,
        "captions": CAPTIONS,
    }


def _different_targets(one: RunDir, other: RunDir) -> ValueError:
    told = []
    for run_dir in (one, other):
        config = load_run(run_dir.path).config
        told.append(f"{run_dir.path.name} ({describe_target(config, run_dir.targets)})")
    return ValueError(
        f"{told[0]} and {told[1]} decompose different targets: their weights differ. "
        "target.from_run decomposes the target of another run"
    )


Matrix = list[list[float | None]]


def _matrices(of_runs: Sequence[Subcomponents]) -> dict[str, Matrix]:
    n = len(of_runs)
    to_column: Matrix = [[None] * n for _ in range(n)]
    matched: Matrix = [[None] * n for _ in range(n)]
    for i, j in combinations_with_replacement(range(n), 2):
        found = similarity(of_runs[i], of_runs[j])
        to_column[i][j], to_column[j][i] = found.to_second, found.to_first
        matched[i][j] = matched[j][i] = found.matched
    return {"to_column": to_column, "matched": matched}


def _mean(matrices: list[Matrix]) -> Matrix:
    """Over the modules that have a value, each counting the same."""
    stacked = np.array(matrices, dtype=float)
    counts = np.isfinite(stacked).sum(0)
    sums = np.nansum(stacked, 0)
    return [
        [s / c if c else None for s, c in zip(*row, strict=True)]
        for row in zip(sums.tolist(), counts.tolist(), strict=True)
    ]


# ---------------------------------------------------------------- what is shown


def draw_similarity(summary: dict[str, Any], file: Path) -> None:
    """Two heatmaps over pairs of runs."""
    from matplotlib import pyplot as plt

    from spd_core.metrics import figures  # matplotlib takes long

    names, n = short_names(summary["runs"]), len(summary["runs"])
    size = min(max(3.2, 0.42 * n), 14)
    figure, axes = plt.subplots(1, 2, figsize=(2 * size + 1.6, size + 0.6), layout="constrained")
    titles = {"to_column": "best counterpart in the column's run", "matched": "matched one to one"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        values = np.array(summary[key], dtype=float)
        ax.imshow(values, "Blues", vmin=0, vmax=1)
        ax.set_title(title, fontsize=10)
        ax.set_xticks(np.arange(0.5, n - 1), minor=True)
        ax.set_yticks(np.arange(0.5, n - 1), minor=True)
        ax.grid(which="minor", color="white")
        ax.tick_params(which="both", length=0)
        ticks = range(0, n, -(-n // 40))
        ax.set_xticks(ticks, [names[i] for i in ticks], rotation=90, fontsize=8)
        ax.set_yticks(ticks, [names[i] for i in ticks], fontsize=8)
        for i, j in np.ndindex(n, n) if n <= 12 else []:
            none = np.isnan(values[i, j])
            text = "none\nalive" if none else f"{values[i, j]:.3f}"
            color = "white" if values[i, j] > 0.6 else "black"
            ax.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(axes[0].images[0], ax=axes, label="similarity")
    figures.save(figure, file)


def draw_modules(summary: dict[str, Any], file: Path) -> None:
    """A row per module, a dot per pair of runs."""
    from matplotlib import pyplot as plt

    from spd_core.metrics import figures

    modules, n = summary["modules"], len(summary["runs"])
    figure, ax = plt.subplots(figsize=(7.5, 1.3 + 0.32 * len(modules)), layout="constrained")
    others = ~np.eye(n, dtype=bool)
    kinds = {"to_column": ("best counterpart", -0.13, "#3b6ea5"),
             "matched": ("matched one to one", 0.13, "#c8702a")}  # fmt: skip
    for key, (label, shift, color) in kinds.items():
        for y, matrices in enumerate(modules.values()):
            values = np.array(matrices[key], dtype=float)[others]
            values = values[np.isfinite(values)]
            ax.plot(values, np.full(len(values), y + shift), "o", ms=5, alpha=0.6, color=color,
                    label=label if y == 0 else None)  # fmt: skip
            if not len(values):
                ax.text(0.5, y, "none alive", ha="center", va="center", fontsize=8)
    ax.set(xlim=(-0.02, 1.02), ylim=(len(modules) - 0.5, -0.5), xlabel="similarity")
    ax.set_yticks(range(len(modules)), list(modules), fontsize=8)
    ax.grid(axis="x", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    figures.save(figure, file)


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Means over pairs of different runs, a row per module."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("module", "alive", "best counterpart", "matched one to one"):
        table.add_column(column, justify="left" if column == "module" else "right", no_wrap=True)
    others = ~np.eye(len(summary["runs"]), dtype=bool)
    for name, matrices in summary["modules"].items():
        counts = summary["alive"][name]
        few, many = min(counts), max(counts)
        cells = [str(few) if few == many else f"{few} to {many}"]
        for key in ("to_column", "matched"):
            values = np.array(matrices[key], dtype=float)[others]
            values = values[np.isfinite(values)]
            cells.append(f"{values.mean():.4f}" if len(values) else "none alive")
        table.add_row(name, *cells)
    console.print(table)
    if summary["left_out"]:
        console.print(f"left out, as not every run has them: {', '.join(summary['left_out'])}")


def main() -> int:
    parser = command.parser("spd_analysis.compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="LAUNCH|RUN", help="folders or ids")
    parser.add_argument("--importance", type=float, default=0.1, help="default: 0.1")
    parser.add_argument("--density", type=float, default=0.001, help="default: 0.001")
    parser.add_argument("--steps", type=int, help="batches of data; default: the config's")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    arguments = parser.parse_args()
    console = Console()
    try:
        runs = with_checkpoints(arguments.runs, console)
        settings = Settings(arguments.importance, arguments.density, arguments.steps)
        here = distributed.init(0, 1, 0, "", arguments.device)
        summary = compare_runs(runs, settings, here)
    except (ValueError, OSError) as error:  # OSError: the store of data, say, cannot be reached
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = analysis_folder(arguments.runs, runs, "compare")
    with rewritten(folder) as new:
        (new / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        draw_similarity(summary, new / "similarity.png")
        draw_modules(summary, new / "modules.png")
    print_summary(summary, console)
    console.print(f"wrote {folder}", soft_wrap=True, highlight=False)
    page = ""
    if len(arguments.runs) == 1:  # a launch, whose report shows this too
        launch = shlex.quote(arguments.runs[0])
        page = f", or put all on one page: python -m spd_analysis.report {launch}"
    console.print(
        f"next: look at {folder / 'similarity.png'}{page}", soft_wrap=True, highlight=False
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
