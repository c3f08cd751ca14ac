"""What goes wrong because of what was asked, told in one message.

LaunchError (a ValueError)   a wrong name, value, profile or folder, or Slurm said no: code 2
everything else              a bug of ours: a traceback
"""

import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches


class LaunchError(ValueError):
    """The user asked for something that cannot be; the message says what would be right."""


def nearest(given: str, valid: Iterable[str]) -> str:
    """`; did you mean X? valid: ...` for the end of an error message."""
    names = sorted(valid)
    close = get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ";"
    return f"{hint} valid: {', '.join(names) or 'none'}"


def exit_with(main: Callable[[], int]) -> None:
    """Run a command; a LaunchError becomes one message and exit code 2."""
    try:
        sys.exit(main())
    except LaunchError as error:
        if os.environ.get("SPD_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # the usual way out of --watch and -f
        sys.exit(130)
    except BrokenPipeError:  # `... | head` closed the pipe: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
