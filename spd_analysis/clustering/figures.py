"""One picture of a clustering: the tree of merges beside the co-activation that they follow."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from spd_analysis.clustering.activations import Activations
from spd_analysis.clustering.history import History, members

QUIET, MARK = "#9aa5b1", "#c0392b"
MOST_SHOWN = 600  # rows and columns of the matrix
MOST_NAMED = 60


def draw_clustering(history: History, activations: Activations, title: str, file: Path) -> None:
    """Write the picture.

    On the left each line is a group, from its first iteration to the merge that ends it; groups of
    several members in the best partition have a colour. On the right, in the same order: of the
    samples on which the row is active, the share on which the column is too. Below, the cost.
    """
    # Imported here: matplotlib takes long.
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    from spd_core.metrics import figures

    n = len(activations.subcomponents)
    order = _order(history, n)
    place = np.empty(n)
    place[order] = np.arange(n)
    (best,) = history.labels(n, np.array([history.best]))
    several = [group for group in members(best) if len(group) > 1]

    figure = figures.plt.figure(figsize=(13, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(5, 1), width_ratios=(1.15, 1))
    tree, matrix = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    curve = figure.add_subplot(grid[1, 0], sharex=tree)
    notes = figure.add_subplot(grid[1, 1])
    figure.suptitle(title)

    colors = {int(g): f"C{i % 10}" for i, group in enumerate(several) for g in group}
    lines, line_colors = _tree_lines(history, place, colors)
    tree.add_collection(LineCollection(lines, colors=line_colors, linewidths=1.2))
    for group in several:
        tree.plot(np.full(len(group), history.best), place[group], " ")  # keeps them in view
    tree.axvline(history.best, color=MARK, linewidth=1, linestyle="--")
    tree.set(
        xlim=(0, 1.02 * max(history.iters, 1)), ylim=(n - 0.5, -0.5), title="groups, merge by merge"
    )
    if n <= MOST_NAMED:
        tree.set_yticks(range(n), [activations.subcomponents[i] for i in order], fontsize=7)
    else:
        tree.set_ylabel("subcomponents, in the order in which they meet")

    shown = order[:: -(-n // MOST_SHOWN)]
    extent = (-0.5, n - 0.5, n - 0.5, -0.5)
    image = matrix.imshow(
        _shares(activations, shown), "Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest"
    )
    for group in several:
        # A popped subcomponent may have come back, so that a group need not be one stretch.
        for start, stop in _stretches(np.sort(place[group]).astype(int)):
            corner, side = (start - 0.5, start - 0.5), stop - start
            matrix.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=MARK))
    matrix.set(
        title="of the row's samples, the share on which the column is active", xticks=[], yticks=[]
    )
    figure.colorbar(image, ax=matrix)

    curve.plot(history.cost, color=figures.COLOR)
    curve.plot(history.best, history.cost[history.best], "o", color=MARK)
    curve.set(xlabel="iteration", ylabel="bits per sample")
    curve.grid(alpha=0.25)
    notes.axis("off")
    notes.text(
        0, 0.9,
        f"{n} subcomponents on {activations.n_samples:,} samples ({activations.n_dead} dead)\n"
        f"lowest cost {history.cost[history.best]:.4g} bits per sample, after iteration "
        f"{history.best}:\n{history.n_groups[history.best]} groups, {len(several)} of them with "
        "several members (framed, coloured)",
        va="top",
    )  # fmt: skip
    figures.save(figure, file)


def _order(history: History, n: int) -> Int[np.ndarray, "n"]:
    """Subcomponents in an order in which every group that is merged is one stretch.

    One that was popped leaves its stretch.
    """
    groups = {i: [i] for i in range(n)}
    for (stays, ends), popped in zip(history.merges.tolist(), history.popped.tolist(), strict=True):
        groups[stays] = groups[stays] + groups.pop(ends)
        if popped >= 0:
            groups[next(g for g in groups if popped in groups[g])].remove(popped)
            groups[ends] = [popped]
    return np.array([i for _, group in sorted(groups.items()) for i in group])


def _tree_lines(
    history: History, place: Float[np.ndarray, "n"], colors: dict[int, str]
) -> tuple[list[list[tuple[float, float]]], list[str]]:
    """A level line for the life of each group, an upright one for each merge; and their colours.

    A group's height is the mean of its members' places.
    """
    sums, counts, born = place.copy(), np.ones(len(place)), np.zeros(len(place))
    label, lines, line_colors = np.arange(len(place)), [], []
    color = [colors.get(i, QUIET) for i in range(len(place))]

    def end(group: int, at: int) -> float:
        height = sums[group] / counts[group]
        lines.append([(born[group], height), (at, height)])
        line_colors.append(color[group])
        born[group] = at
        return height

    for at, ((stays, ends), popped) in enumerate(
        zip(history.merges.tolist(), history.popped.tolist(), strict=True), start=1
    ):
        lines.append([(at, end(stays, at)), (at, end(ends, at))])
        color[stays] = color[stays] if color[stays] == color[ends] else QUIET
        line_colors.append(color[stays])
        sums[stays], counts[stays] = sums[stays] + sums[ends], counts[stays] + counts[ends]
        label[label == ends] = stays
        if popped >= 0:
            rest = int(label[popped])
            end(rest, at)
            sums[rest], counts[rest] = sums[rest] - place[popped], counts[rest] - 1
            label[popped] = ends
            sums[ends], counts[ends], born[ends] = place[popped], 1, at
            color[ends] = colors.get(popped, QUIET)
    for group in np.unique(label).tolist():
        end(group, history.iters)
    return lines, line_colors


def _shares(activations: Activations, shown: Int[np.ndarray, "m"]) -> Float[np.ndarray, "m m"]:
    values = activations.values[:, shown]
    common = [activations.total(activations.common(values, c[:, None])) for c in values.T]
    return np.stack(common) / np.maximum(activations.total(values)[:, None], 1e-12)


def _stretches(places: Int[np.ndarray, "m"]) -> list[tuple[int, int]]:
    """Runs of neighbours, as (first, one after the last)."""
    runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs]
