import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spd_launch.errors import LaunchError
from spd_launch.snapshot import code_digest, drop_snapshot, push_snapshot, take_snapshot

REPO = Path(__file__).parents[2]


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
    (repo / "gone.py").write_text("for another day")
    git(repo, "stash")
    (repo / "staged.py").write_text("staged\n")
    git(repo, "add", "staged.py")
    (repo / "spd_launch" / "__init__.py").write_text("VALUE = 2\n")
    (repo / "new file.py").write_text("untracked\n")
    (repo / "secret").write_text("ignored\n")
    (repo / "gone.py").unlink()

    def seen() -> list[str | bytes]:
        status = ["--no-optional-locks", "status", "--porcelain"]  # else it may write the index
        asked = (status, ["log"], ["reflog"], ["stash", "list", "-p"])
        return [(repo / ".git/index").read_bytes(), *(git(repo, *words) for words in asked)]

    before = seen()
    code = tmp_path / "a launch" / "code"
    snapshot = take_snapshot(repo, code, "id-1", exclude=tmp_path / "out", max_mb=1)
    assert seen() == before
    names = sorted(str(f.relative_to(code)) for f in code.rglob("*") if f.is_file())
    assert names == [".gitignore", "new file.py", "spd_launch/__init__.py", "staged.py"]
    assert (code / "spd_launch/__init__.py").read_text() == "VALUE = 2\n"
    assert git(repo, "rev-parse", "refs/snapshots/id-1").strip() == snapshot.commit
    assert git(repo, "show", "refs/snapshots/id-1:new file.py") == "untracked\n"
    assert git(repo, "branch", "--list").split() == ["*", "main"]

    (repo / "spd_launch" / "__init__.py").write_text("VALUE = 3\n")
    assert (code / "spd_launch/__init__.py").read_text() == "VALUE = 2\n"


def test_many_at_the_same_moment_do_not_collide(repo: Path, tmp_path: Path) -> None:
    (repo / "new.py").write_text("new\n")

    def take(i: int) -> None:
        take_snapshot(repo, tmp_path / f"code-{i}", f"id-{i}", exclude=tmp_path / "out", max_mb=1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, range(8)))
    trees = {git(repo, "rev-parse", f"refs/snapshots/id-{i}^{{tree}}") for i in range(8)}
    assert len(trees) == 1 and not (repo / ".git/index.lock").exists()
    assert all((tmp_path / f"code-{i}" / "new.py").read_text() == "new\n" for i in range(8))


def test_a_snapshot_of_this_repository_takes_a_moment(tmp_path: Path) -> None:
    before = os.times()
    take_snapshot(REPO, tmp_path / "code", "of-a-test", exclude=REPO / "outputs", max_mb=10)
    after = os.times()
    drop_snapshot(REPO, "of-a-test")
    assert (tmp_path / "code/spd_core/train.py").exists()
    assert sum(after[:4]) - sum(before[:4]) < 5  # of the processor: others may use it, too


@pytest.mark.parametrize("out", ["results", "outputs"])  # in the repository; one of them ignored
def test_results_stay_out(repo: Path, out: str) -> None:
    (repo / out).mkdir()
    (repo / out / "big.bin").write_text("x")
    code = repo / out / "launches" / "id" / "code"
    take_snapshot(repo, code, "id", exclude=repo / out, max_mb=1)
    assert not (code / out).exists()
    assert (code / "spd_launch/__init__.py").exists()


def test_repository_without_a_commit_and_package_in_a_subfolder(tmp_path: Path) -> None:
    package = tmp_path / "mono" / "sub" / "spd_launch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(tmp_path / "mono", "init", "-q")
    snapshot = take_snapshot(
        package.parent, tmp_path / "code", "id", exclude=tmp_path / "out", max_mb=1
    )
    assert snapshot.python_path == tmp_path / "code" / "sub"


def test_no_repository_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"no usable git repository .* launch\.snapshot=off"):
        take_snapshot(tmp_path, tmp_path / "code", "id", exclude=tmp_path, max_mb=1)


def test_installed_code_that_git_ignores_is_no_snapshot(repo: Path, tmp_path: Path) -> None:
    site = repo / "outputs" / "site-packages"
    (site / "spd_launch").mkdir(parents=True)
    (site / "spd_launch" / "__init__.py").write_text("")
    with pytest.raises(LaunchError, match="git ignores"):
        take_snapshot(site, tmp_path / "code", "id", exclude=tmp_path, max_mb=1)


def test_the_digest_of_the_code_is_that_of_its_python_files(repo: Path, tmp_path: Path) -> None:
    (repo / "spd_core").mkdir()
    (repo / "spd_core" / "losses.py").write_text("a = 1\n")
    objects = sorted((repo / ".git" / "objects").rglob("*"))
    first = code_digest(repo, repo / "outputs", max_mb=1)
    assert sorted((repo / ".git" / "objects").rglob("*")) == objects
    assert take_snapshot(repo, tmp_path / "code", "id-1", repo / "outputs", 1).digest == first

    def digest_with(path: str, text: str) -> str:
        file = repo / path
        before = file.read_text() if file.exists() else None
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        found = code_digest(repo, repo / "outputs", max_mb=1)
        file.unlink() if before is None else file.write_text(before)
        return found

    for path in ("spd_core/losses.py", "my parts/loss.py", "new.py"):
        assert digest_with(path, "b = 2\n") != first, path
    for path in ("sweeps/x.yaml", "spd_launch/__init__.py", "tests/test_x.py", "docs/x.md",
                 "spd_analysis/x.py", "outputs/x.py"):  # fmt: skip
        assert digest_with(path, "b = 2\n") == first, path
    assert code_digest(repo, repo / "outputs", max_mb=1) == first
    git(repo, "add", ".")
    git(repo, "commit", "-qm", "committed is the same")
    assert code_digest(repo, repo / "outputs", max_mb=1) == first


def test_the_digest_of_the_code_in_a_subfolder_of_a_repository(repo: Path, tmp_path: Path) -> None:
    part = repo / "part"
    for name in ("spd_core", "spd_launch"):
        (part / name).mkdir(parents=True)
        (part / name / "__init__.py").write_text("")
    first = code_digest(part, tmp_path, max_mb=1)
    (part / "spd_launch" / "__init__.py").write_text("a = 1\n")
    assert code_digest(part, tmp_path, max_mb=1) == first
    (part / "spd_core" / "__init__.py").write_text("a = 1\n")
    assert code_digest(part, tmp_path, max_mb=1) != first


def test_repositories_inside_symlinks_and_odd_names(repo: Path, tmp_path: Path) -> None:
    inner = repo / "part s"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "one.py").write_text("a = 1\n")
    git(inner, "add", ".")
    git(inner, "commit", "-qm", "inner")
    git(repo, "add", "part s")
    git(repo, "commit", "-qm", "with a part")
    (inner / "one.py").write_text("a = 2\n")
    (inner / "two.py").write_text("")
    names = ["tab\there.py", 'quo"te.py', "süß.py", "new\nline.py", "-dash.py", ":(top)x.py"]
    for name in names:
        (repo / name).write_text(name)
    raw = os.fsencode(repo) + b"/latin\xff.py"
    with open(raw, "w") as file:
        file.write("raw")
    (repo / "link.py").symlink_to("gone.py")
    (repo / "nowhere").symlink_to("/no/such/place")
    before = git(repo, "status", "--porcelain"), git(inner, "status", "--porcelain")

    code = tmp_path / "code"
    taken = take_snapshot(repo, code, "id", repo / "outputs", max_mb=1)
    assert before == (git(repo, "status", "--porcelain"), git(inner, "status", "--porcelain"))
    assert (code / "part s/one.py").read_text() == "a = 2\n" and (code / "part s/two.py").exists()
    assert all((code / name).read_text() == name for name in names)
    assert os.path.exists(os.fsencode(code) + b"/latin\xff.py")
    assert os.readlink(code / "link.py") == "gone.py"
    assert os.readlink(code / "nowhere") == "/no/such/place"
    # Git knows the inner state by the commit that the outer one names.
    inner_commit = git(repo, "rev-parse", f"{taken.commit}:part s").strip()
    assert git(inner, "show", f"{inner_commit}:one.py") == "a = 2\n"

    assert code_digest(repo, repo / "outputs", max_mb=1) == taken.digest
    (inner / "two.py").write_text("b = 1\n")
    assert code_digest(repo, repo / "outputs", max_mb=1) != taken.digest
    drop_snapshot(repo, "id")
    for place in (repo, inner):
        assert git(place, "for-each-ref", "refs/snapshots/") == ""


def test_a_large_untracked_file_is_left_out_and_named(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (repo / "da ta.bin").write_bytes(bytes(2_000_000))
    (repo / "small.bin").write_bytes(bytes(900_000))
    take_snapshot(repo, tmp_path / "code", "id", repo / "outputs", max_mb=1)
    assert "'" + str(repo / "da ta.bin") + "' (2 MB" in capsys.readouterr().err
    assert not (tmp_path / "code/da ta.bin").exists() and (tmp_path / "code/small.bin").exists()
    git(repo, "add", "da ta.bin")  # who tracks it means it
    take_snapshot(repo, tmp_path / "code 2", "id", repo / "outputs", max_mb=1)
    assert (tmp_path / "code 2/da ta.bin").exists() and not capsys.readouterr().err


def test_a_snapshot_without_a_copy_and_one_that_is_pushed(repo: Path, tmp_path: Path) -> None:
    taken = take_snapshot(repo, None, "id", repo / "outputs", max_mb=1)
    assert taken.python_path == repo
    assert git(repo, "rev-parse", "refs/snapshots/id").strip() == taken.commit
    there = tmp_path / "there.git"
    git(tmp_path, "init", "-q", "--bare", str(there))
    push_snapshot(repo, "id", str(there))
    assert git(there, "rev-parse", "refs/snapshots/id").strip() == taken.commit
    with pytest.raises(LaunchError, match=r"git push: .*nowhere"):
        push_snapshot(repo, "id", "nowhere")
