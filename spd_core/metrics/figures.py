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
from spd_core.metrics.ci import RANGES, CiStatistic
from spd_core.metrics.solutions import permute_to_identity

COLOR = "#3b6ea5"


def permuted_ci(ci: dict[str, Float[Tensor, "n_features C"]]) -> Figure:
    """Causal importances of single features, columns ordered towards the identity."""
    figure, axes = plt.subplots(
        1, len(ci), figsize=(5.5 * len(ci), 2.6), squeeze=False, layout="constrained"
    )
    for ax, (name, values) in zip(axes[0], ci.items(), strict=True):
        _heatmap(ax, permute_to_identity(values), 0, 1, "Blues", "causal importance")
        ax.set(title=name, xlabel="subcomponent (reordered)", ylabel="active feature")
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
            f"{name}: V (d_in x C)": V,
            "U (C x d_out)": U,
            "sum of subcomponents (VU)^T": (V @ U).T,
            "target weight W": module.weight,
        }
        for ax, (title, matrix) in zip(row, panels.items(), strict=True):
            limit = max(matrix.abs().max().item(), 1e-6)
            _heatmap(ax, matrix, -limit, limit, "RdBu_r", "")
            ax.set_title(title, fontsize=10)
    return figure


def _heatmap(
    ax: Axes, matrix: Float[Tensor, "rows columns"], low: float, high: float, cmap: str, label: str
) -> None:
    image = ax.imshow(
        matrix.cpu().numpy(),
        vmin=low,
        vmax=high,
        cmap=cmap,
        aspect="auto",
        interpolation="nearest",
    )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.figure.colorbar(image, ax=ax, label=label)


def ci_histograms(statistics: dict[str, CiStatistic]) -> Figure:
    """Distributions of lower, upper and pre-sigmoid values over positions and subcomponents."""
    figure, axes = plt.subplots(
        len(statistics), 3, figsize=(11, 2.6 * len(statistics)), squeeze=False, layout="constrained"
    )
    for row, (name, statistic) in zip(axes, statistics.items(), strict=True):
        for ax, (kind, counts) in zip(row, statistic.histograms.items(), strict=True):
            low, high = RANGES[kind]
            edges = np.linspace(low, high, len(counts) + 1)
            ax.bar(
                edges[:-1],
                counts.cpu().numpy(),
                width=edges[1] - edges[0],
                align="edge",
                color=COLOR,
            )
            ax.set(yscale="log", title=f"{name}: {kind}", ylabel="count", xlim=(low, high))
    return figure


def per_component(values: dict[str, Float[Tensor, "C"]], ylabel: str) -> Figure:
    """One value per subcomponent, sorted, on a logarithmic axis."""
    figure, axes = plt.subplots(
        1, len(values), figsize=(5.5 * len(values), 2.8), squeeze=False, layout="constrained"
    )
    for ax, (name, module_values) in zip(axes[0], values.items(), strict=True):
        ordered = module_values.sort(descending=True).values.cpu().numpy()
        ax.bar(range(len(ordered)), np.maximum(ordered, 1e-6), color=COLOR)
        ax.set(
            yscale="log", ylim=(1e-6, 1), title=name, xlabel="subcomponent (sorted)", ylabel=ylabel
        )
    return figure
