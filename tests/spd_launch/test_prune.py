import subprocess
from pathlib import Path

import pytest
from launches import launched, set_state

from spd_launch import prune
from spd_launch.ledger import LaunchDir, read_rows


def git(repo: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repo), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    repo = tmp_path / "repo"
    repo.mkdir()
    git(repo, "init", "-q")
    git(repo, "commit", "-qm", "first", "--allow-empty")
    monkeypatch.setattr(prune, "PACKAGE_ROOT", repo)
    return repo


def keep(repo: Path, launch: LaunchDir, ending: str = "") -> str:
    git(repo, "update-ref", f"refs/snapshots/{launch.launch_id}{ending}", "HEAD")
    return f"{launch.launch_id}{ending}"


def test_only_the_code_of_launches_that_are_over_goes_and_only_when_told(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    over, at_work = launched(out, "finished", "failed", "cancelled"), launched(out, "running")
    (over.path / "code-2").mkdir()
    (over.path / "code-2" / "x.py").write_text("y" * 1_000_000)
    kept = {keep(repo, at_work), "other"}
    git(repo, "update-ref", "refs/snapshots/other", "HEAD")
    keep(repo, over)
    keep(repo, over, "-2")
    monkeypatch.setattr("sys.argv", ["prune", f"--out-dir={out}"])
    assert prune.main() == 0
    text = capsys.readouterr().out
    assert "1.0 MB of 1 launch(es). Nothing is removed yet" in text and "not over" in text
    assert over.code.is_dir()

    monkeypatch.setattr("sys.argv", ["prune", f"--out-dir={out}", "--yes"])
    assert prune.main() == 0
    assert "freed 1.0 MB of 1 launch(es)" in capsys.readouterr().out
    assert not list(over.path.glob("code*")) and at_work.code.is_dir()
    refs = git(repo, "for-each-ref", "--format=%(refname:lstrip=2)", "refs/snapshots").split()
    assert {*refs} == kept
    assert read_rows(over)  # all else of it stays

    set_state(at_work, read_rows(at_work)[0].name, "finished")
    monkeypatch.setattr("sys.argv", ["prune", at_work.launch_id, f"--out-dir={out}", "--yes"])
    assert prune.main() == 0
    assert not at_work.code.exists()

    refs = git(repo, "for-each-ref", "--format=%(refname:lstrip=2)", "refs/snapshots").split()
    assert refs == ["other"] and "1 snapshot(s) of launches" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["prune", f"--out-dir={out}", "--strays"])
    assert prune.main() == 0
    assert git(repo, "for-each-ref", "refs/snapshots") == ""
