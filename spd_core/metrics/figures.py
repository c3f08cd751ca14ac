"""Figures of a decomposition. Each function returns a matplotlib figure; none shows or saves it."""

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

COLOR = "#3b6ea5"


def permuted_ci(ci: dict[str, Float[Tensor, "n_features C"]]) -> Figure:
    """Causal importances of single features, columns ordered towards the identity."""
    figure, axes = _grid(len(ci), width=5.5, height=2.6)
    for ax, (name, values) in zip(axes, ci.items(), strict=True):
        _heatmap(ax, permute_to_identity(values), 0, 1, "Blues", "causal importance")
        ax.set(xlabel="subcomponent (reordered)", ylabel="active feature")
        _title(ax, name)
    return figure


def uv(components: dict[str, LinearComponents], order: dict[str, list[int]]) -> Figure:
    """V, U and what they add up to beside the target weight, for every module."""
    figure, axes = plt.subplots(
        len(components), 4, figsize=(13, 2.9 * len(components)), squeeze=False, layout="constrained"
    )
    for row, (name, module) in zip(axes, components.items(), strict=True):
        V = module.V.detach()[:, order[name]]
        U = module.U.detach()[order[name]]
        panels = {
            "V (d_in x C)": V,
            "U (C x d_out)": U,
            "sum of subcomponents (VU)^T": (V @ U).T,
            "target weight W": module.weight,
        }
        for ax, (title, matrix) in zip(row, panels.items(), strict=True):
            limit = max(matrix.abs().max().item(), 1e-6)
            _heatmap(ax, matrix, -limit, limit, "RdBu_r", "")
            _title(ax, name, title)
    return figure


def _heatmap(
    ax: Axes, matrix: Float[Tensor, "rows columns"], low: float, high: float, cmap: str, label: str
) -> None:
    image = ax.imshow(
        matrix.float().cpu().numpy(),  # numpy has no bfloat16, which autocast may give
        vmin=low,
        vmax=high,
        cmap=cmap,
        aspect="auto",
        interpolation="nearest",
    )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.figure.colorbar(image, ax=ax, label=label)


def ci_histograms(counts: dict[str, Float[Tensor, "3 n_bins"]]) -> Figure:
    """Distributions of lower, upper and pre-sigmoid values over positions and subcomponents."""
    figure, axes = plt.subplots(
        len(counts), 3, figsize=(11, 2.6 * len(counts)), squeeze=False, layout="constrained"
    )
    for row, (name, histograms) in zip(axes, counts.items(), strict=True):
        for ax, (kind, (low, high)), heights in zip(row, RANGES.items(), histograms, strict=True):
            edges = np.linspace(low, high, len(heights) + 1)
            ax.stairs(heights.cpu().numpy(), edges, fill=True, color=COLOR)
            ax.set(yscale="log", ylabel="count", xlim=(low, high))
            _title(ax, name, kind)
    return figure


def per_component(sums: dict[str, Float[Tensor, "C_plus_1"]], ylabel: str) -> Figure:
    """Means over positions of every subcomponent, sorted, on a logarithmic axis.

    The last entry of `sums` is the number of positions.
    """
    figure, axes = _grid(len(sums), width=3.8, height=2.6)
    for ax, (name, module_sums) in zip(axes, sums.items(), strict=True):
        means = (module_sums[:-1] / module_sums[-1]).sort(descending=True).values.cpu().numpy()
        ax.stairs(means, np.arange(len(means) + 1) - 0.5, fill=True, color=COLOR)
        scale = "log" if means[0] > 0 else "linear"  # where all are at 0 there is no logarithm
        ax.set(yscale=scale, ylim=(1e-6, 1), xlabel="subcomponent (sorted)", ylabel=ylabel)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _title(ax, name)
    return figure


def _title(ax: Axes, name: str, panel: str = "") -> None:
    """The module and what is shown of it; long module paths shrink to fit their panel."""
    ax.set_title(f"{name}\n{panel}".strip(), fontsize=min(10, 320 / len(name)))


def _grid(n: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """n axes in rows of up to four, sizes in inches."""
    columns = min(n, 4)
    rows = -(-n // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    return figure, list(axes.flat[:n])
