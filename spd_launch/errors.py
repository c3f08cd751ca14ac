"""What goes wrong because of what was asked, told in one message.

LaunchError (a ValueError)   a wrong name, value, profile or folder, or Slurm said no: code 2
OSError of UNWRITABLE        a disk that is full, read-only or somebody else's: code 2
everything else              a bug of ours: a traceback
"""

import errno
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches

UNWRITABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
}  # fmt: skip


class LaunchError(ValueError):
    """The user asked for something that cannot be; the message says what would be right."""


def nearest(given: str, valid: Iterable[str]) -> str:
    """`; did you mean X? valid: ...` for the end of an error message."""
    names = sorted(valid)
    close = get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ";"
    return f"{hint} valid: {', '.join(names) or 'none'}"


def exit_with(main: Callable[[], int]) -> None:
    """Run a command; a LaunchError becomes one message and exit code 2.

    What it writes, others of the user's group may continue.
    """
    os.umask(0o002)
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
    except OSError as error:
        if error.errno not in UNWRITABLE or os.environ.get("SPD_TRACEBACK") == "1":
            raise
        where = error.filename or "the folder of results"
        print(
            f"error: cannot use {where}: {error.strerror}; make room or get leave to write there, "
            "or choose another folder with launch.out_dir=... or SPD_OUT_DIR",
            file=sys.stderr,
        )
        sys.exit(2)
