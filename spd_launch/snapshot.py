"""The code that runs is the code that was there: a copy of the dirty working tree, through git.

Tracked edits and untracked (not ignored) files go into a commit under refs/snapshots/ and into a
folder, by way of a temporary index: the user's index, stash, branch and files are never touched.
Submodules, and other repositories inside, are saved in the same way, in their own git folders.
Local runs use a snapshot too: it costs about a twentieth of a second.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from spd_launch.compose import PACKAGE_ROOT
from spd_launch.config import LaunchConfig
from spd_launch.errors import LaunchError

# A launch from a git hook must not write into that hook's index.
_GIT_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")


@dataclass(frozen=True)
class Snapshot:
    """`python_path` is what holds spd_core and spd_launch; commit is None without a snapshot.

    `left_out` names the untracked files that were too large.
    """

    python_path: Path
    commit: str | None
    left_out: tuple[Path, ...]


def code_for(options: LaunchConfig, code: Path, launch_id: str) -> Snapshot:
    """What launch.snapshot asks for, pushed if that is asked for; says what was left out."""
    if options.snapshot == "off":
        return Snapshot(PACKAGE_ROOT, None, ())
    copy = code if options.snapshot == "copy" else None
    taken = take_snapshot(PACKAGE_ROOT, copy, launch_id, options.out_dir, options.snapshot_max_mb)
    for file in taken.left_out:
        size = file.lstat().st_size / 1e6
        print(
            f"left out of the snapshot: {str(file)!r} ({size:.0f} MB; launch.snapshot_max_mb="
            f"{options.snapshot_max_mb:g}). Put it into .gitignore, or raise the limit",
            file=sys.stderr,
        )
    if options.snapshot_push_to is not None:
        push_snapshot(PACKAGE_ROOT, launch_id, options.snapshot_push_to)
    return taken


def take_snapshot(
    package_root: Path, code: Path | None, launch_id: str, exclude: Path, max_mb: float
) -> Snapshot:
    """Save the repository that holds `package_root`, and copy it to `code` if that is not None.

    `exclude` (results) stays out, and so do untracked files of more than `max_mb` MB.

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
    commit, left_out = _save(Path(top), code, launch_id, exclude, max_mb)
    python_path = package_root if code is None else code / prefix
    if not (python_path / "spd_launch" / "__init__.py").is_file():
        raise LaunchError(
            f"git ignores {package_root} in {top}, so its snapshot lacks the code; "
            "run from a clone, or with launch.snapshot=off"
        )
    return Snapshot(python_path, commit, tuple(left_out))


def _save(
    top: Path, code: Path | None, launch_id: str, exclude: Path, max_mb: float
) -> tuple[str, list[Path]]:
    """Commit one repository with those inside it; returns the commit, and what was too large."""
    left_out = _large_files(top, max_mb)
    unwanted = [*_without(exclude, top), *(f":(exclude,literal){name}" for name in left_out)]
    named = [top / name for name in left_out]
    with TemporaryDirectory(prefix="spd-snapshot-") as folder:
        index = Path(folder) / "index"
        own = Path(top, _git(top, "rev-parse", "--git-path", "index"))
        if own.exists():  # a copy spares git to hash what has not changed
            shutil.copy2(own, index)
        _git(top, "add", "--all", "--", ".", *unwanted, index=index)
        for name in _repositories_inside(top, index):
            inner, more = _save(top / name, code and code / name, launch_id, exclude, max_mb)
            _git(top, "update-index", "--cacheinfo", f"160000,{inner},{name}", index=index)
            named += more
        commit = _commit(top, _git(top, "write-tree", index=index), launch_id)
        if code is not None:
            _git(top, "checkout-index", "--all", f"--prefix={code}/", index=index)
    return commit, named


def _large_files(top: Path, max_mb: float) -> list[str]:
    """The untracked files that nobody would want in every launch's folder."""
    names = _git(top, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    # A name that ends in / is another repository.
    files = [name for name in names if name and not name.endswith("/")]
    return [name for name in files if (top / name).lstat().st_size > max_mb * 1e6]


def _repositories_inside(top: Path, index: Path | None) -> list[str]:
    """Submodules that are there, and repositories that were cloned into this one."""
    entries = _git(top, "ls-files", "--stage", "-z", index=index).split("\0")
    links = [entry.split("\t", 1)[1] for entry in entries if entry.startswith("160000 ")]
    return [name for name in links if (top / name / ".git").exists()]


def push_snapshot(package_root: Path, launch_id: str, remote: str) -> None:
    """Send the commit of a snapshot to a remote, under the same name as here.

    Raises:
        LaunchError: git refused; the message shows git's words.
    """
    _git(package_root, "push", "--quiet", remote, f"refs/snapshots/{launch_id}")


def snapshots(package_root: Path) -> list[str]:
    """The names of all snapshots that git keeps here."""
    refs = _git(package_root, "for-each-ref", "--format=%(refname)", "refs/snapshots/")
    return [ref.removeprefix("refs/snapshots/") for ref in refs.splitlines()]


def drop_snapshot(package_root: Path, launch_id: str) -> None:
    """Let git forget a snapshot that nothing runs on; its next gc frees the space."""
    top = _ask(package_root, "rev-parse", "--show-toplevel").stdout.removesuffix("\n")
    if not top:
        return
    _ask(top, "update-ref", "-d", f"refs/snapshots/{launch_id}")
    for name in _repositories_inside(Path(top), None):
        drop_snapshot(Path(top, name), launch_id)


def _without(exclude: Path, top: Path) -> list[str]:
    inside = exclude.resolve().is_relative_to(top.resolve())
    # git add refuses to hear of paths that it ignores anyway
    if not inside or _ask(top, "check-ignore", "--quiet", str(exclude.resolve())).returncode == 0:
        return []
    return [f":(exclude,literal){exclude.resolve().relative_to(top.resolve())}"]


def _commit(top: Path, tree: str, launch_id: str) -> str:
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
        done = subprocess.run(command, env=_environment(index), capture_output=True)
    except FileNotFoundError:
        raise LaunchError("git is not installed; launch.snapshot=off runs without it") from None
    # Names of files are any bytes: no decoding that refuses some, no change of line ends.
    out, err = os.fsdecode(done.stdout), os.fsdecode(done.stderr)
    return subprocess.CompletedProcess(command, done.returncode, out, err)
