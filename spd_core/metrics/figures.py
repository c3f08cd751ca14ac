"""Figures of a decomposition. Each function returns a matplotlib figure; `save` writes it."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from spd_core.components import LinearComponents
from spd_core.metrics.ci import RANGES
from spd_core.metrics.solutions import permute_to_identity
from spd_core.run_dir import written_whole

COLOR = "#3b6ea5"


def permuted_ci(ci: dict[str, Float[Tensor, "n_features C"]]) -> Figure:
    """Causal importances of single features, columns ordered towards the identity."""
    figure, panels = _panels(ci, columns=4, width=5.5, height=2.6)
    for ax, values in panels:
        _heatmap(ax, permute_to_identity(values), 0, 1, "Blues", "causal importance")
        ax.set(xlabel="subcomponent (reordered)", ylabel="active feature")
    return figure


def uv(components: dict[str, LinearComponents], order: dict[str, list[int]]) -> Figure:
    """V, U and what they add up to beside the target weight, for every module."""
    matrices = {}
    for name, module in components.items():
        V, U = module.V.detach()[:, order[name]], module.U.detach()[order[name]]
        matrices[f"{name}\nV (d_in x C)"] = V
        matrices[f"{name}\nU (C x d_out)"] = U
        matrices[f"{name}\nsum of subcomponents (VU)^T"] = (V @ U).T
        matrices[f"{name}\ntarget weight W"] = module.weight
    figure, panels = _panels(matrices, columns=4, width=3.25, height=2.9)
    for ax, matrix in panels:
        limit = max(matrix.abs().max().item(), 1e-6)
        _heatmap(ax, matrix, -limit, limit, "RdBu_r", "")
    return figure


def ci_histograms(counts: dict[str, Float[Tensor, "3 n_bins"]]) -> Figure:
    """Distributions of lower, upper and pre-sigmoid values over positions and subcomponents."""
    histograms = {
        f"{name}\n{kind}": (np.linspace(low, high, len(heights) + 1), heights.cpu().numpy())
        for name, module_counts in counts.items()
        for (kind, (low, high)), heights in zip(RANGES.items(), module_counts, strict=True)
    }
    figure, panels = _panels(histograms, columns=3, width=11 / 3, height=2.6)
    for ax, (edges, heights) in panels:
        ax.stairs(heights, edges, fill=True, color=COLOR)
        ax.set(yscale="log", ylabel="count", xlim=(edges[0], edges[-1]))
    return figure


def per_component(sums: dict[str, Float[Tensor, "C_plus_1"]], ylabel: str) -> Figure:
    """Means over positions of every subcomponent, sorted, on a logarithmic axis.

    The last entry of `sums` is the number of positions.
    """
    figure, panels = _panels(sums, columns=4, width=3.8, height=2.6)
    for ax, module_sums in panels:
        means = (module_sums[:-1] / module_sums[-1]).sort(descending=True).values.cpu().numpy()
        ax.stairs(means, np.arange(len(means) + 1) - 0.5, fill=True, color=COLOR)
        scale = "log" if means[0] > 0 else "linear"  # where all are at 0 there is no logarithm
        ax.set(yscale=scale, ylim=(1e-6, 1), xlabel="subcomponent (sorted)", ylabel=ylabel)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as new:
        figure.savefig(new, dpi=130, format=path.suffix[1:])
    plt.close(figure)


def _heatmap(
    ax: Axes, matrix: Float[Tensor, "rows columns"], low: float, high: float, cmap: str, label: str
) -> None:
    values = matrix.float().cpu().numpy()  # numpy has no bfloat16, which autocast may give
    image = ax.imshow(values, cmap, aspect="auto", interpolation="nearest", vmin=low, vmax=high)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    ax.figure.colorbar(image, ax=ax, label=label)


def _panels(
    data: dict[str, Any], columns: int, width: float, height: float
) -> tuple[Figure, list[tuple[Axes, Any]]]:
    """Axes for each piece of data under its title, in rows of up to so many; sizes in inches."""
    columns = min(len(data), columns)
    rows = -(-len(data) // columns)
    figure = plt.figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(data))]
    for ax, title in zip(axes, data, strict=True):
        # Long module paths shrink to fit their panel.
        ax.set_title(title, fontsize=min(10, 320 / len(title.split("\n")[0])))
    return figure, list(zip(axes, data.values(), strict=True))
