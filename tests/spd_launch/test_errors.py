"""How a command ends: one message for what a user can mend."""

import resource
import subprocess
import sys
from pathlib import Path

from test_command import ROOT

LAUNCH = ["spd_launch", "+experiment=tms_5-2", "cluster=local", "launch.snapshot=off"]


def no_file_may_hold_anything() -> None:
    """As good as a full disk, and needs no disk of its own."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_a_disk_that_takes_nothing_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCH, f"launch.out_dir={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, preexec_fn=no_file_may_hold_anything,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: cannot use the folder of results: File too large" in done.stderr
    assert "launch.out_dir" in done.stderr
    assert not list(tmp_path.glob("runs/*")) and not list(tmp_path.glob("launches/*"))


def test_what_a_command_writes_others_of_the_group_may_change(tmp_path: Path) -> None:
    write = "import pathlib; pathlib.Path('a').mkdir(); pathlib.Path('a/b').touch()"
    code = f"from spd_launch.errors import exit_with; exit_with(lambda: exec({write!r}) or 0)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, umask=0o077)
    modes = [oct((tmp_path / name).stat().st_mode & 0o777) for name in ("a", "a/b")]
    assert modes == ["0o775", "0o664"]
