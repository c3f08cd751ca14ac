"""The code that runs is the code that was there: a copy of the dirty working tree, through git.

Tracked edits and untracked (not ignored) files go into a commit under refs/snapshots/ and into a
folder, by way of a temporary index: the user's index, branch and files are never touched, and
nothing is pushed. Local runs use a snapshot too: it costs about a twentieth of a second.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from spd_launch.errors import LaunchError

# A launch from a git hook must not write into that hook's index.
_GIT_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")


# What stands in these folders of ours does not change what a run comes to.
_BESIDE = ("spd_launch/", "spd_analysis/", "tests/", "benchmarks/", "docs/")


@dataclass(frozen=True)
class Snapshot:
    """`python_path` is what holds spd_core and spd_launch; `digest` is that of `code_digest`.

    Without a snapshot nobody knows what was run: commit and digest are None.
    """

    python_path: Path
    commit: str | None
    digest: str | None


def take_snapshot(package_root: Path, code: Path, launch_id: str, exclude: Path) -> Snapshot:
    """Copy the repository that holds `package_root` to `code`; `exclude` (results) stays out.

    Raises:
        LaunchError: no git repository, or git refused; the message shows git's words.
    """
    top, prefix = repository(package_root)
    with TemporaryDirectory(prefix="spd-snapshot-") as folder:
        index = {"GIT_INDEX_FILE": f"{folder}/index"}
        tree = _add_all(top, exclude, index)
        digest = _digest_of_python(top, prefix, tree, index)
        commit = _commit(top, tree, launch_id)
        _git(top, "checkout-index", "--all", f"--prefix={code}/", **index)
    python_path = code / prefix
    if not (python_path / "spd_launch" / "__init__.py").is_file():
        raise LaunchError(
            f"git ignores {package_root} in {top}, so its snapshot lacks the code; "
            "run from a clone, or with launch.snapshot=off"
        )
    return Snapshot(python_path, commit, digest)


def code_digest(package_root: Path, exclude: Path) -> str:
    """What the code comes to that a snapshot of this moment would hold; writes nothing.

    Every Python file and submodule counts, also a part of the user's own, but the folders of ours
    that only launch, look at or test a run: 16 hexadecimal digits.

    Raises:
        LaunchError: as `take_snapshot`.
    """
    top, prefix = repository(package_root)
    own = Path(top, _git(top, "rev-parse", "--git-path", "objects"))
    with TemporaryDirectory(prefix="spd-snapshot-") as folder:
        Path(folder, "objects").mkdir()
        beside = {
            "GIT_INDEX_FILE": f"{folder}/index",
            "GIT_OBJECT_DIRECTORY": f"{folder}/objects",
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(own),
        }
        return _digest_of_python(top, prefix, _add_all(top, exclude, beside), beside)


def repository(package_root: Path) -> tuple[str, str]:
    """The top folder of the repository, and where in it the package lies."""
    try:
        shown = _git(package_root, "rev-parse", "--show-toplevel", "--show-prefix")
    except LaunchError as error:
        raise LaunchError(
            f"no usable git repository holds {package_root}, so no snapshot of the code can be "
            f"made; launch.snapshot=off runs the files as they are ({error})"
        ) from None
    top, prefix = shown.split("\n")
    return top, prefix


def _add_all(top: str, exclude: Path, variables: Mapping[str, str]) -> str:
    """Put the working tree into the index that the variables name; returns git's tree."""
    own = Path(top, _git(top, "rev-parse", "--git-path", "index"))
    if own.exists():  # a copy spares git to hash what has not changed
        shutil.copy2(own, variables["GIT_INDEX_FILE"])
    _git(top, "add", "--all", "--", ".", *_without(exclude, Path(top)), **variables)
    return _git(top, "write-tree", **variables)


def _digest_of_python(top: str, prefix: str, tree: str, variables: Mapping[str, str]) -> str:
    """Of the lines `mode type object<TAB>path` that git lists."""
    listed = _git(top, "ls-tree", "-r", "-z", tree, **variables).split("\0")
    kept = [
        line
        for line in listed
        if (line.endswith(".py") or " commit " in line)
        and not line.partition("\t")[2].removeprefix(prefix).startswith(_BESIDE)
    ]
    return hashlib.sha256("\0".join(kept).encode()).hexdigest()[:16]


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


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    person = {
        f"GIT_{who}_{what}": "spd@localhost"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    kept = {k: v for k, v in os.environ.items() if k not in _GIT_VARIABLES}
    return {**kept, **person, **variables}


def _git(where: str | Path, *arguments: str, **variables: str) -> str:
    done = _ask(where, *arguments, **variables)
    if done.returncode:
        raise LaunchError(f"git {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.removesuffix("\n")


def _ask(where: str | Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(where), *arguments]
    try:
        return subprocess.run(command, env=_environment(variables), capture_output=True, text=True)
    except FileNotFoundError:
        raise LaunchError("git is not installed; launch.snapshot=off runs without it") from None
