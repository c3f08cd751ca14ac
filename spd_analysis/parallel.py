"""Parallel coordinates: a line for every run through an axis for every column, as SVG."""

import math
import re
from collections.abc import Sequence
from html import escape

Value = float | str | None
Columns = dict[str, list[Value]]
"""Name -> value of every run; None where a run has none."""

WIDTH, TOP, BOTTOM, SIDE = 1180, 60, 300, 90  # pixels
LABEL = 18  # characters in a line of an axis's name


def parallel_coordinates(run_ids: Sequence[str], columns: Columns, color_by: str) -> str:
    """An svg element of class `lines`; a run's path has its id in `data-run`.

    Two columns or more; the colours of the lines go from blue to red with `color_by`.
    """
    step = (WIDTH - 2 * SIDE) / (len(columns) - 1)
    axes, ticks, paths = "", "", ""
    points: list[list[str | None]] = [[] for _ in run_ids]  # of a run on every axis
    for i, (name, values) in enumerate(columns.items()):
        heights, labels = axis(values)
        x = SIDE + i * step
        for of_run, height in zip(points, heights, strict=True):
            of_run.append(None if height is None else f"{x:.0f} {_y(height):.1f}")
        axes += f"<line x1='{x:.0f}' x2='{x:.0f}' y1='{TOP}' y2='{BOTTOM}' stroke='#c5cdd5'/>"
        lines = wrapped(name, LABEL)
        for row, line in enumerate(lines):
            y = TOP - 12 - 13 * (len(lines) - 1 - row)
            axes += f"<text x='{x:.0f}' y='{y}' text-anchor='middle'>{escape(line)}</text>"
        for height, label in labels:
            y = _y(height) + 3
            ticks += f"<text class='tick' x='{x + 6:.0f}' y='{y:.0f}'>{escape(label)}</text>"
    for run_id, of_run, place in zip(run_ids, points, axis(columns[color_by])[0], strict=True):
        path, pen = "", "M"
        for point in of_run:  # a missing value interrupts the line
            path += "" if point is None else pen + point
            pen = "M" if point is None else "L"
        color = f"hsl({210 - 180 * (place or 0):.0f} 65% 48%)"
        paths += (
            f"<path data-run='{escape(run_id)}' d='{path}' style='stroke: {color}'>"
            f"<title>{escape(run_id)}</title></path>"
        )
    return f"<svg class='lines' viewBox='0 0 {WIDTH} {BOTTOM + 20}'>{axes}{paths}{ticks}</svg>"


def axis(values: Sequence[Value]) -> tuple[list[float | None], list[tuple[float, str]]]:
    """The height of each value, from 0 to 1, and the ticks.

    Words are spread evenly in their order; numbers are on a logarithmic axis where all are
    positive and far apart.
    """
    numbers = [float(v) for v in values if isinstance(v, int | float)]
    if len(numbers) < sum(v is not None for v in values):
        words = sorted({str(v) for v in values if v is not None})
        places = {word: i / max(len(words) - 1, 1) for i, word in enumerate(words)}
        heights = [None if v is None else places[str(v)] for v in values]
        return heights, [(height, word) for word, height in places.items()]
    finite = [v for v in numbers if math.isfinite(v)] or [0.0]
    low, high = min(finite), max(finite)
    scale = math.log if low > 0 and high > 20 * low else float
    span = scale(high) - scale(low) or 1.0
    heights = [
        (scale(v) - scale(low)) / span if isinstance(v, int | float) and math.isfinite(v) else None
        for v in values
    ]
    digits = ".2g" if f"{low:.2g}" != f"{high:.2g}" else ".6g"
    return heights, [(0.0, f"{low:{digits}}"), (1.0, f"{high:{digits}}")]


def wrapped(name: str, width: int) -> list[str]:
    """A name in lines of at most so many characters, where it has spaces, dots or underscores."""
    lines = [""]
    for word in re.findall(r"[^._ ]+[._ ]?|[._ ]", name):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += word
    return lines


def _y(height: float) -> float:
    return BOTTOM - height * (BOTTOM - TOP)
