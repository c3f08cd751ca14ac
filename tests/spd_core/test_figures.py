"""Figures hold the right numbers, and nothing in them overlaps or is cut off."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from spd_core.components import LinearComponents
from spd_core.metrics import figures
from spd_core.metrics.ci import N_BINS, RANGES

# Nine modules, as deep in a model as those of a language model are.
NAMES = [f"transformer.h.{i}.self_attention.q_proj.pre_identity" for i in range(9)]


def components(names, C=3, d_in=4, d_out=2):
    generator = torch.Generator().manual_seed(0)
    return {n: LinearComponents(nn.Linear(d_in, d_out), C, generator) for n in names}


def drawings(names):
    """Every built-in figure, of these modules."""
    order = {n: [2, 0, 1] for n in names}
    means = {n: torch.tensor([3.0, 8.0, 0.0, 10.0]) for n in names}
    counts = {n: torch.arange(3 * N_BINS).view(3, N_BINS) for n in names}
    return {
        "permuted_ci": lambda: figures.permuted_ci({n: torch.rand(5, 6) for n in names}),
        "uv": lambda: figures.uv(components(names), order),
        "ci_histograms": lambda: figures.ci_histograms(counts),
        "per_component": lambda: figures.per_component(means, "share of positions active"),
    }


@pytest.fixture(autouse=True)
def _close():
    yield
    figures.plt.close("all")


def panels(figure):
    """The axes that are seen, without colour bars."""
    return [ax for ax in figure.axes if ax.get_visible() and ax.get_label() != "<colorbar>"]


def image(ax):
    return np.asarray(ax.images[0].get_array())


def heights(ax):
    return np.asarray(ax.patches[0].get_data().values)


@pytest.mark.parametrize("kind", drawings(NAMES))
def test_titles_are_whole_and_nothing_overlaps(kind):
    names = NAMES if kind in ("permuted_ci", "per_component") else NAMES[:2]
    figure = drawings(names)[kind]()
    figure.canvas.draw()
    page = figure.bbox
    boxes = [ax.get_tightbbox() for ax in figure.axes if ax.get_visible()]
    for box in boxes:
        assert box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0 and box.y1 <= page.y1
    for one, other in combinations(boxes, 2):
        overlap = (
            min(one.x1, other.x1) - max(one.x0, other.x0),
            min(one.y1, other.y1) - max(one.y0, other.y0),
        )
        assert min(overlap) < 1  # a pixel
    titles = [ax.get_title() for ax in panels(figure)]
    assert all(any(title.startswith(name) for title in titles) for name in names)
    assert min(ax.title.get_fontsize() for ax in panels(figure)) >= 5


@pytest.mark.parametrize("n, rows, columns", [(1, 1, 1), (4, 1, 4), (5, 2, 4), (9, 3, 4)])
@pytest.mark.parametrize("kind", ["permuted_ci", "per_component"])
def test_the_grid_wraps_at_four_columns(kind, n, rows, columns):
    figure = drawings(NAMES[:n])[kind]()
    grid = panels(figure)[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols, len(panels(figure))) == (rows, columns, n)


def test_permuted_ci_puts_the_identity_on_the_diagonal():
    ci = torch.tensor([[0.0, 0.1, 0.9], [0.8, 0.2, 0.0]])
    (ax,) = panels(figures.permuted_ci({"a": ci}))
    np.testing.assert_allclose(image(ax), [[0.9, 0.0, 0.1], [0.0, 0.8, 0.2]])
    assert ax.images[0].get_clim() == (0, 1)


def test_uv_shows_components_in_order_beside_the_weight():
    model = components(["a"])
    c = model["a"]
    V, U = c.V.detach().numpy(), c.U.detach().numpy()
    order = [2, 0, 1]
    got = [image(ax) for ax in panels(figures.uv(model, {"a": order}))]
    wanted = [V[:, order], U[order], (V @ U).T, c.weight.numpy()]
    for matrix, expected in zip(got, wanted, strict=True):
        np.testing.assert_allclose(matrix, expected, rtol=1e-5, atol=1e-6)


def test_bars_are_means_in_falling_order():
    (ax,) = panels(figures.per_component({"a": torch.tensor([2.0, 0.0, 4.0, 1.0, 8.0])}, "mean"))
    np.testing.assert_allclose(heights(ax), [0.5, 0.25, 0.125, 0.0])
    assert ax.get_yscale() == "log" and ax.get_ylabel() == "mean"


def test_histograms_have_their_own_ranges():
    counts = torch.arange(3 * N_BINS, dtype=torch.float64).view(3, N_BINS)
    axes = panels(figures.ci_histograms({"a": counts}))
    for ax, (low, high), expected in zip(axes, RANGES.values(), counts, strict=True):
        np.testing.assert_array_equal(heights(ax), expected)
        edges = ax.patches[0].get_data().edges
        np.testing.assert_allclose(edges, np.linspace(low, high, N_BINS + 1))
