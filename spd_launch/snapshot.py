"""The code that runs is the code that was there: a copy of the dirty working tree, through git.

Tracked edits and untracked (not ignored) files go into a commit under refs/snapshots/ and into a
folder, by way of a temporary index: the user's index, branch and files are never touched, and
nothing is pushed. Local runs use a snapshot too: it costs about a twentieth of a second.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from spd_launch.errors import LaunchError

# A launch from a git hook must not write into that hook's index.
_GIT_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")


@dataclass(frozen=True)
class Snapshot:
    """`python_path` is what holds spd_core and spd_launch; commit is None without a snapshot."""

    python_path: Path
    commit: str | None


def take_snapshot(package_root: Path, code: Path, launch_id: str, exclude: Path) -> Snapshot:
    """Copy the repository that holds `package_root` to `code`; `exclude` (results) stays out.

    Raises:
        LaunchError: no git repository, or git refused; the message shows git's words.
    """
    try:
        top, prefix = _git(package_root, "rev-parse", "--show-toplevel", "--show-prefix").split(
            "\n"
        )
    except LaunchError as error:
        raise LaunchError(
            f"no usable git repository holds {package_root}, so no snapshot of the code can be "
            f"made; launch.snapshot=off runs the files as they are ({error})"
        ) from None
    with TemporaryDirectory(prefix="spd-snapshot-") as folder:
        index = Path(folder) / "index"
        own = Path(top, _git(top, "rev-parse", "--git-path", "index"))
        if own.exists():  # a copy spares git to hash what has not changed
            shutil.copy2(own, index)
        _git(top, "add", "--all", "--", ".", *_without(exclude, Path(top)), index=index)
        tree = _git(top, "write-tree", index=index)
        commit = _commit(top, tree, launch_id)
        _git(top, "checkout-index", "--all", f"--prefix={code}/", index=index)
    python_path = code / prefix
    if not (python_path / "spd_launch" / "__init__.py").is_file():
        raise LaunchError(
            f"git ignores {package_root} in {top}, so its snapshot lacks the code; "
            "run from a clone, or with launch.snapshot=off"
        )
    return Snapshot(python_path, commit)


def drop_snapshot(package_root: Path, launch_id: str) -> None:
    """Let git forget a snapshot that nothing runs on."""
    _ask(package_root, "update-ref", "-d", f"refs/snapshots/{launch_id}")


def _without(exclude: Path, top: Path) -> list[str]:
    inside = exclude.resolve().is_relative_to(top.resolve())
    # git add refuses to hear of paths that it ignores anyway
    if not inside or _ask(top, "check-ignore", "--quiet", str(exclude.resolve())).returncode == 0:
        return []
    return [f":(exclude,literal){exclude.resolve().relative_to(top.resolve())}"]


def _commit(top: str, tree: str, launch_id: str) -> str:
    head = _ask(top, "rev-parse", "--verify", "--quiet", "HEAD").stdout.strip()
    parents = ["-p", head] if head else []  # a new repository has no commit yet
    commit = _git(top, "commit-tree", tree, *parents, "-m", f"snapshot of {launch_id}")
    _git(top, "update-ref", f"refs/snapshots/{launch_id}", commit)
    return commit


def _environment(index: Path | None = None) -> dict[str, str]:
    person = {
        f"GIT_{who}_{what}": "spd@localhost"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    kept = {k: v for k, v in os.environ.items() if k not in _GIT_VARIABLES}
    return {**kept, **person, **({"GIT_INDEX_FILE": str(index)} if index else {})}


def _git(where: str | Path, *arguments: str, index: Path | None = None) -> str:
    done = _ask(where, *arguments, index=index)
    if done.returncode:
        raise LaunchError(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.removesuffix("\n")


def _ask(
    where: str | Path, *arguments: str, index: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(where), *arguments]
    try:
        return subprocess.run(command, env=_environment(index), capture_output=True, text=True)
    except FileNotFoundError:
        raise LaunchError("git is not installed; launch.snapshot=off runs without it") from None
