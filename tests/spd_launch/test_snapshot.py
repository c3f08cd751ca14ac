import subprocess
from pathlib import Path

import pytest

from spd_launch.errors import LaunchError
from spd_launch.snapshot import code_digest, take_snapshot


def git(repo: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repo), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with a space in its path, holding a package, a commit and a .gitignore."""
    repo = tmp_path / "my repo"
    package = repo / "spd_launch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("VALUE = 1\n")
    (repo / ".gitignore").write_text("outputs/\nsecret\n")
    (repo / "gone.py").write_text("")
    git(repo, "init", "-q", "-b", "main")
    git(repo, "add", ".")
    git(repo, "commit", "-qm", "first")
    return repo


def test_snapshot_is_the_dirty_tree_and_touches_nothing(repo: Path, tmp_path: Path) -> None:
    (repo / "staged.py").write_text("staged\n")
    git(repo, "add", "staged.py")
    (repo / "spd_launch" / "__init__.py").write_text("VALUE = 2\n")
    (repo / "new file.py").write_text("untracked\n")
    (repo / "secret").write_text("ignored\n")
    (repo / "gone.py").unlink()
    before = (
        git(repo, "status", "--porcelain"),
        (repo / ".git/index").read_bytes(),
        git(repo, "log"),
    )

    code = tmp_path / "a launch" / "code"
    snapshot = take_snapshot(repo, code, "id-1", exclude=tmp_path / "out")

    assert before == (
        git(repo, "status", "--porcelain"),
        (repo / ".git/index").read_bytes(),
        git(repo, "log"),
    )
    names = sorted(str(f.relative_to(code)) for f in code.rglob("*") if f.is_file())
    assert names == [".gitignore", "new file.py", "spd_launch/__init__.py", "staged.py"]
    assert (code / "spd_launch/__init__.py").read_text() == "VALUE = 2\n"
    assert git(repo, "rev-parse", "refs/snapshots/id-1").strip() == snapshot.commit
    assert git(repo, "show", "refs/snapshots/id-1:new file.py") == "untracked\n"
    assert git(repo, "branch", "--list").split() == ["*", "main"]

    (repo / "spd_launch" / "__init__.py").write_text("VALUE = 3\n")
    assert (code / "spd_launch/__init__.py").read_text() == "VALUE = 2\n"


@pytest.mark.parametrize("out", ["results", "outputs"])  # in the repository; one of them ignored
def test_results_stay_out(repo: Path, out: str) -> None:
    (repo / out).mkdir()
    (repo / out / "big.bin").write_text("x")
    code = repo / out / "launches" / "id" / "code"
    take_snapshot(repo, code, "id", exclude=repo / out)
    assert not (code / out).exists()
    assert (code / "spd_launch/__init__.py").exists()


def test_repository_without_a_commit_and_package_in_a_subfolder(tmp_path: Path) -> None:
    package = tmp_path / "mono" / "sub" / "spd_launch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(tmp_path / "mono", "init", "-q")
    snapshot = take_snapshot(package.parent, tmp_path / "code", "id", exclude=tmp_path / "out")
    assert snapshot.python_path == tmp_path / "code" / "sub"


def test_no_repository_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"no usable git repository .* launch\.snapshot=off"):
        take_snapshot(tmp_path, tmp_path / "code", "id", exclude=tmp_path)


def test_installed_code_that_git_ignores_is_no_snapshot(repo: Path, tmp_path: Path) -> None:
    site = repo / "outputs" / "site-packages"
    (site / "spd_launch").mkdir(parents=True)
    (site / "spd_launch" / "__init__.py").write_text("")
    with pytest.raises(LaunchError, match="git ignores"):
        take_snapshot(site, tmp_path / "code", "id", exclude=tmp_path)


def test_the_digest_of_the_code_is_that_of_its_python_files(repo: Path, tmp_path: Path) -> None:
    (repo / "spd_core").mkdir()
    (repo / "spd_core" / "losses.py").write_text("a = 1\n")
    objects = sorted((repo / ".git" / "objects").rglob("*"))
    first = code_digest(repo, exclude=repo / "outputs")
    assert sorted((repo / ".git" / "objects").rglob("*")) == objects
    assert take_snapshot(repo, tmp_path / "code", "id-1", repo / "outputs").digest == first

    def digest_with(path: str, text: str) -> str:
        file = repo / path
        before = file.read_text() if file.exists() else None
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        found = code_digest(repo, exclude=repo / "outputs")
        file.unlink() if before is None else file.write_text(before)
        return found

    for path in ("spd_core/losses.py", "my parts/loss.py", "new.py"):
        assert digest_with(path, "b = 2\n") != first, path
    for path in ("sweeps/x.yaml", "spd_launch/__init__.py", "tests/test_x.py", "docs/x.md",
                 "spd_analysis/x.py", "outputs/x.py"):  # fmt: skip
        assert digest_with(path, "b = 2\n") == first, path
    assert code_digest(repo, exclude=repo / "outputs") == first
    git(repo, "add", ".")
    git(repo, "commit", "-qm", "committed is the same")
    assert code_digest(repo, exclude=repo / "outputs") == first


def test_the_digest_of_the_code_in_a_subfolder_of_a_repository(repo: Path, tmp_path: Path) -> None:
    part = repo / "part"
    for name in ("spd_core", "spd_launch"):
        (part / name).mkdir(parents=True)
        (part / name / "__init__.py").write_text("")
    first = code_digest(part, tmp_path)
    (part / "spd_launch" / "__init__.py").write_text("a = 1\n")
    assert code_digest(part, tmp_path) == first
    (part / "spd_core" / "__init__.py").write_text("a = 1\n")
    assert code_digest(part, tmp_path) != first
