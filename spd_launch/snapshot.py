"""The code that runs is the code that was there: a copy of the dirty working tree, through git.

Tracked edits and untracked (not ignored) files go into a commit under refs/snapshots/ and into a
folder, by way of a temporary index: the user's index, stash, branch and files are never touched.
Submodules, and other repositories inside, are saved in the same way, in their own git folders.
Local runs use a snapshot too: it costs about a twentieth of a second.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from spd_launch.compose import PACKAGE_ROOT
from spd_launch.config import LaunchConfig
from spd_launch.errors import LaunchError

# A launch from a git hook must not write into that hook's index.
_GIT_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
MAX_LINES = 5  # of git's words: on a full disk it has some for every file
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


@dataclass(frozen=True)
class _Tree:
    """The working tree of a repository, and those of the repositories inside, as git has them now.

    `variables` say which index and objects git is to use.
    """

    top: Path
    tree: str
    variables: Mapping[str, str]
    left_out: list[str]
    inside: Mapping[str, "_Tree"]


def code_for(options: LaunchConfig, code: Path, launch_id: str) -> Snapshot:
    """What launch.snapshot asks for, pushed if that is asked for."""
    if options.snapshot == "off":
        return Snapshot(PACKAGE_ROOT, None, None)
    copy = code if options.snapshot == "copy" else None
    taken = take_snapshot(PACKAGE_ROOT, copy, launch_id, options.out_dir, options.snapshot_max_mb)
    if options.snapshot_push_to is not None:
        push_snapshot(PACKAGE_ROOT, launch_id, options.snapshot_push_to)
    return taken


def take_snapshot(
    package_root: Path, code: Path | None, launch_id: str, exclude: Path, max_mb: float
) -> Snapshot:
    """Save the repository that holds `package_root`, and copy it to `code` if that is not None.

    `exclude` (results) stays out, and so do untracked files of more than `max_mb` MB, with a word.

    Raises:
        LaunchError: no git repository, or git refused; the message shows git's words.
    """
    top, prefix = repository(package_root)
    with TemporaryDirectory(prefix="spd-snapshot-") as folder:
        tree = _tree_of(top, exclude, max_mb, Path(folder), own_objects=True)
        digest = _digest_of_python(tree, prefix)
        commit = _commit(tree, launch_id)
        if code is not None:
            _write(tree, code)
    python_path = package_root if code is None else code / prefix
    if not (python_path / "spd_launch" / "__init__.py").is_file():
        raise LaunchError(
            f"git ignores {package_root} in {top}, so its snapshot lacks the code; "
            "run from a clone, or with launch.snapshot=off"
        )
    for file in _left_out(tree):
        print(
            f"left out of the snapshot: {str(file)!r} ({file.lstat().st_size / 1e6:.0f} MB, over "
            f"launch.snapshot_max_mb={max_mb:g}); a line in .gitignore ends this warning",
            file=sys.stderr,
        )
    return Snapshot(python_path, commit, digest)


def code_digest(package_root: Path, exclude: Path, max_mb: float) -> str:
    """What the code comes to that a snapshot of this moment would hold; writes nothing.

    Every Python file and submodule counts, also a part of the user's own, but the folders of ours
    that only launch, look at or test a run: 16 hexadecimal digits.

    Raises:
        LaunchError: as `take_snapshot`.
    """
    top, prefix = repository(package_root)
    with TemporaryDirectory(prefix="spd-snapshot-") as folder:
        return _digest_of_python(
            _tree_of(top, exclude, max_mb, Path(folder), own_objects=False), prefix
        )


def repository(package_root: Path) -> tuple[Path, str]:
    """The top folder of the repository, and where in it the package lies."""
    try:
        shown = _git(package_root, "rev-parse", "--show-toplevel", "--show-prefix")
    except LaunchError as error:
        raise LaunchError(
            f"no usable git repository holds {package_root}, so no snapshot of the code can be "
            f"made; launch.snapshot=off runs the files as they are ({error})"
        ) from None
    top, prefix = shown.split("\n")
    return Path(top), prefix


def _tree_of(top: Path, exclude: Path, max_mb: float, folder: Path, own_objects: bool) -> _Tree:
    """Put the working tree into an index in `folder`, and what git has to store of it there too,
    unless that is to go where the repository has its own objects."""
    variables = {"GIT_INDEX_FILE": f"{folder}/index"}
    if not own_objects:
        (folder / "objects").mkdir()
        variables["GIT_OBJECT_DIRECTORY"] = f"{folder}/objects"
        own = Path(top, _git(top, "rev-parse", "--git-path", "objects"))
        variables["GIT_ALTERNATE_OBJECT_DIRECTORIES"] = str(own)
    index = Path(top, _git(top, "rev-parse", "--git-path", "index"))
    if index.exists():  # a copy spares git to hash what has not changed
        shutil.copy2(index, variables["GIT_INDEX_FILE"])
    large = _large_files(top, max_mb)
    unwanted = [*_without(exclude, top), *(f":(exclude,literal){name}" for name in large)]
    _git(top, "add", "--all", "--", ".", *unwanted, **variables)
    inside = {}
    for number, name in enumerate(_repositories_inside(top, variables)):
        (folder / str(number)).mkdir()
        inner = folder / str(number)
        inside[name] = _tree_of(top / name, exclude, max_mb, inner, own_objects)
    return _Tree(top, _git(top, "write-tree", **variables), variables, large, inside)


def _large_files(top: Path, max_mb: float) -> list[str]:
    """The untracked files that nobody would want in every launch's folder."""
    names = _git(top, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
    # A name that ends in / is another repository.
    files = [name for name in names if name and not name.endswith("/")]
    return [name for name in files if (top / name).lstat().st_size > max_mb * 1e6]


def _repositories_inside(top: Path, variables: Mapping[str, str]) -> list[str]:
    """Submodules that are there, and repositories that were cloned into this one."""
    entries = _git(top, "ls-files", "--stage", "-z", **variables).split("\0")
    links = [entry.partition("\t")[2] for entry in entries if entry.startswith("160000 ")]
    return [name for name in links if (top / name / ".git").exists()]


def _left_out(tree: _Tree) -> Iterator[Path]:
    yield from (tree.top / name for name in tree.left_out)
    for inner in tree.inside.values():
        yield from _left_out(inner)


def _digest_of_python(tree: _Tree, prefix: str) -> str:
    lines = [
        line
        for line in _python_lines(tree)
        if not line.partition("\t")[2].removeprefix(prefix).startswith(_BESIDE)
    ]
    return hashlib.sha256(os.fsencode("\0".join(lines))).hexdigest()[:16]


def _python_lines(tree: _Tree) -> Iterator[str]:
    """Of the lines `mode type object<TAB>path` that git lists; a repository inside has its own."""
    for line in _git(tree.top, "ls-tree", "-r", "-z", tree.tree, **tree.variables).split("\0"):
        head, _, name = line.partition("\t")
        if name in tree.inside:
            for inner in _python_lines(tree.inside[name]):
                inner_head, _, inner_name = inner.partition("\t")
                yield f"{inner_head}\t{name}/{inner_name}"
        elif name.endswith(".py") or " commit " in head:
            yield line


def _commit(tree: _Tree, launch_id: str) -> str:
    """Commit the trees, the inner ones first: the outer ones name their commits."""
    top, variables = tree.top, tree.variables
    for name, inner in tree.inside.items():
        commit = _commit(inner, launch_id)
        _git(top, "update-index", "--cacheinfo", f"160000,{commit},{name}", **variables)
    written = _git(top, "write-tree", **variables) if tree.inside else tree.tree
    head = _ask(top, "rev-parse", "--verify", "--quiet", "HEAD").stdout.strip()
    parents = ["-p", head] if head else []  # a new repository has no commit yet
    commit = _git(top, "commit-tree", written, *parents, "-m", f"snapshot of {launch_id}")
    _git(top, "update-ref", f"refs/snapshots/{launch_id}", commit)
    return commit


def _write(tree: _Tree, code: Path) -> None:
    _git(tree.top, "checkout-index", "--all", f"--prefix={code}/", **tree.variables)
    for name, inner in tree.inside.items():
        _write(inner, code / name)


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
    for name in _repositories_inside(Path(top), {}):
        drop_snapshot(Path(top, name), launch_id)


def _without(exclude: Path, top: Path) -> list[str]:
    inside = exclude.resolve().is_relative_to(top.resolve())
    # git add refuses to hear of paths that it ignores anyway
    if not inside or _ask(top, "check-ignore", "--quiet", str(exclude.resolve())).returncode == 0:
        return []
    return [f":(exclude,literal){exclude.resolve().relative_to(top.resolve())}"]


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
        lines = done.stderr.strip().splitlines()
        words = "\n".join(lines[:MAX_LINES])
        more = f"\n... and {len(lines) - MAX_LINES} more lines" if lines[MAX_LINES:] else ""
        raise LaunchError(f"git {arguments[0]}: {words}{more}")
    return done.stdout.removesuffix("\n")


def _ask(where: str | Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(where), *arguments]
    try:
        done = subprocess.run(command, env=_environment(variables), capture_output=True)
    except FileNotFoundError:
        raise LaunchError("git is not installed; launch.snapshot=off runs without it") from None
    # Names of files are any bytes: no decoding that refuses some, no change of line ends.
    out, err = os.fsdecode(done.stdout), os.fsdecode(done.stderr)
    return subprocess.CompletedProcess(command, done.returncode, out, err)
