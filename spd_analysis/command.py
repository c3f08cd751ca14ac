"""What the commands of this package have in common: how they are called, and how they fail."""

import argparse
import re
import sys
from collections.abc import Callable
from functools import wraps


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m MODULE`; its help keeps the lines of the module's docstring."""
    return argparse.ArgumentParser(
        module, description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def name(text: str) -> str:
    """A name of results, as the type of an argument.

    Raises:
        argparse.ArgumentTypeError: it would not be the name of one folder or file.
    """
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: letters, digits, . _ and - make a name")
    return text


def errors_are_told(main: Callable[[], int]) -> Callable[[], int]:
    """What the user can mend, a wrong reference or a full disk say, is one line and code 2."""

    @wraps(main)
    def told() -> int:
        try:
            return main()
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return told
