"""What a user writes never reaches a shell: names and paths that would do harm there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch_configs import SMALL

from spd_launch import ledger
from spd_launch.errors import LaunchError
from spd_launch.run_record import read_status
from spd_launch.validate import validate

ROOT = Path(__file__).parent.parent.parent
HOSTILE = "a b;touch PWNED $(touch PWNED) `touch PWNED` 'q' \"d\" #&*|>PWNED"


def hydra(text: str) -> str:
    """A value in Hydra's quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def arguments(out: Path) -> list[str]:
    return [
        "+experiment=tms_5-2", *SMALL, f"launch.out_dir={hydra(str(out))}",
        f"launch.name={hydra(HOSTILE)}", f"cluster.env.HOSTILE={hydra(HOSTILE)}",
        "-m", f"track.wandb.group={hydra(HOSTILE)},x", "eval.slow_every=100",
    ]  # fmt: skip


@pytest.mark.slow
def test_hostile_names_and_paths_do_no_harm_here(tmp_path: Path) -> None:
    out = tmp_path / HOSTILE
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}

    def run(module: str, *given: str) -> str:
        line = [sys.executable, "-m", module, *given]
        done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("spd_launch", *arguments(out), "cluster=local")
    folder = ledger.find_launch("latest", out)
    tasks = ledger.read_tasks(folder)
    assert "PWNED" in folder.launch_id and len(tasks) == 2
    for task in tasks:
        assert re.fullmatch(r"[A-Za-z0-9._-]+", task.run_id)
        status = read_status(folder.run_dir(task.run_id))
        assert status is not None and status.state == "finished"
    for command in ("status", "resume"):
        assert "finished" in run(f"spd_launch.{command}", folder.launch_id, "--out-dir", str(out))
    assert not list(tmp_path.rglob("PWNED")) and not (ROOT / "PWNED").exists()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"partition": "a\ntouch PWNED"}, "cluster.partition"),
        ({"env": {"A;touch PWNED": "x"}}, "cluster.env"),
        ({"sbatch": {"comment": "a\ntouch PWNED"}}, "cluster.sbatch"),
        ({"sbatch": {"x\ntouch PWNED": 1}}, "cluster.sbatch"),
    ],
)
def test_what_could_end_a_line_of_the_script_is_refused(changed, field, values) -> None:
    with pytest.raises(LaunchError, match=field):
        validate({**values, "cluster": {**values["cluster"], **changed}})


@pytest.mark.parametrize("folder", ["/tmp/100%j", "/tmp/a\nb"])
def test_slurm_would_read_another_path(folder, values) -> None:
    with pytest.raises(LaunchError, match=r"launch\.out_dir"):
        validate({**values, "launch": {**values["launch"], "out_dir": folder}})


@pytest.fixture
def values():
    from spd_launch.compose import compose

    return compose(["+experiment=tms_5-2", "cluster=cpu", *SMALL], multirun=False)[0].values
