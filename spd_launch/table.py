"""Tables on a terminal or in a pipe. Rich would take seconds for a thousand rows."""

import re
import sys
import time
from collections.abc import Sequence

COLOURS = {"finished": 32, "failed": 31, "no target": 31, "no run": 31, "running": 36}
NUMBER = re.compile(r"[-+]?\d[\d.,e+-]*")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their header; columns that are empty in all rows are left out.

    Numbers stand at the right. States have colours where this is a terminal.
    """
    shown = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [[row[i] for i in shown] for row in [header, *rows]]
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(NUMBER.fullmatch(cell) for cell in column[1:] if cell) for column in columns]
    for number, line in enumerate(lines):
        cells = [
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(line, widths, right, strict=True)
        ]
        print("  ".join(bold(cell) if number == 0 else coloured(cell) for cell in cells).rstrip())


def coloured(cell: str) -> str:
    colour = COLOURS.get(cell.strip())
    return f"\033[{colour}m{cell}\033[0m" if colour and sys.stdout.isatty() else cell


def bold(cell: str) -> str:
    return f"\033[1m{cell}\033[0m" if sys.stdout.isatty() else cell


def clear_screen() -> None:
    if sys.stdout.isatty():
        print("\033[H\033[2J", end="")


def ago(moment: float) -> str:
    return f"{duration(max(0, time.time() - moment))} ago"


def duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def short(value: float) -> str:
    """Four digits, without an exponent where that is no longer."""
    return f"{value:.4g}"
