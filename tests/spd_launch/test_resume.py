"""Which code a resumed run goes on with; more in test_then.py, test_local.py, tests/cluster."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_configs import SMALL
from launches import launched
from test_command import ROOT

from spd_launch import ledger, resume
from spd_launch.errors import LaunchError
from spd_launch.run_record import read_status


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The working tree as a repository of its own."""
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    project = tmp_path / "my project"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, project / name)
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    return project


@pytest.mark.slow
def test_code_of_then_or_of_now(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    env = {**os.environ, "SPD_OUT_DIR": str(out), "PYTHONPATH": str(project)}

    def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", module, *arguments]
        return subprocess.run(line, cwd=project, env=env, capture_output=True, text=True)

    part = project / "mine.py"
    part.write_text("def loss(model, batch):\n    raise ArithmeticError('a bug')\n")
    mine = "losses.mine={path: mine.loss, coeff: 1.0}"
    first = run("spd_launch", "+experiment=tms_5-2", "cluster=local", *SMALL, mine)
    assert first.returncode != 0 and "a bug" in first.stderr

    part.write_text("def loss(model, batch):\n    return batch.target_out.sum() * 0, 1\n")
    launch = ledger.find_launch("latest", out)
    [row] = ledger.read_rows(launch)
    folder = launch.folder(row)
    then = ledger.read_info(launch)["commit"]
    again = run("spd_launch.resume", "latest")
    assert again.returncode != 0 and "a bug" in again.stderr
    assert json.loads(folder.env_file.read_text())["commit"] == then

    fixed = run("spd_launch.resume", "latest", "--with-code=now")
    assert fixed.returncode == 0, fixed.stderr
    now = ledger.read_info(launch)["commit"]
    status = read_status(folder)
    assert status is not None and (status.state, status.attempt) == ("finished", 3)
    assert now != then and json.loads(folder.env_file.read_text())["commit"] == now
    shown = subprocess.check_output(["git", "show", f"{now}:mine.py"], cwd=project, text=True)
    assert shown == part.read_text()

    assert "kept" not in run("spd_launch.prune", "--yes").stdout
    assert not list(launch.path.glob("code*"))
    refs = subprocess.check_output(["git", "for-each-ref", "refs/snapshots/"], cwd=project)
    assert refs == b""


def test_code_that_is_gone_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = launched(tmp_path, "failed")
    shutil.rmtree(launch.code)
    monkeypatch.setattr("sys.argv", ["resume", "latest", f"--out-dir={tmp_path}"])
    with pytest.raises(LaunchError, match=r"code of this launch is gone.*--with-code=now"):
        resume.main()


@pytest.mark.parametrize("words", [["0", "1"], ["dp=2", "dp=4"], ["dp=x"], ["seed=1"]])
def test_wrong_words_are_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(tmp_path, "failed", "failed")
    monkeypatch.setattr("sys.argv", ["resume", "latest", *words, f"--out-dir={tmp_path}"])
    with pytest.raises(LaunchError, match=r"one TASK at most, and dp=N"):
        resume.main()
