"""A dry run says all that would be sent; that it is what is sent is seen in tests/cluster."""

import re
import shlex
from pathlib import Path

import pytest
from test_command import LOCAL, ROOT, run

from spd_launch.compose import compose
from spd_launch.dry_run import show
from spd_launch.errors import LaunchError
from spd_launch.plan import make_plan
from spd_launch.validate import validate_all

CPU = ["+experiment=tms_5-2", "cluster=cpu"]


def shown(out: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    typed = [*arguments, f"launch.out_dir='{out}'"]
    show(make_plan(validate_all(compose(typed, multirun=True)), "DRYRUN", "0000", stored=[]))
    assert not out.exists()
    return capsys.readouterr().out


def scripts(text: str) -> list[list[str]]:
    """The lines of each script that sbatch would get."""
    return [
        found.splitlines() for found in re.findall(r"---- JOB\d+: .*\n(#!(?:.|\n)*?)\n----", text)
    ]


def test_each_array_with_its_script_environment_and_command(tmp_path: Path, capsys) -> None:
    out = tmp_path / "an out dir"
    text = shown(out, capsys, *CPU, "seed=0,1,2", "dp=2", "launch.max_parallel=2")
    launch = out / "launches" / "DRYRUN-tms_5-2-0000"
    target, runs = scripts(text)
    assert not any("--array" in line for line in target) and "#SBATCH --array=0-2%2" in runs
    assert "#SBATCH --ntasks-per-node=2" in runs and "#SBATCH --dependency=afterok:JOB1" in runs
    code = f"PYTHONPATH={shlex.quote(f'{launch}/code')}"
    assert any(line.removeprefix("export ").startswith(code[:-1]) for line in runs)
    assert f"    SPD_CODE={shlex.quote(f'{launch}/code')}" in text.splitlines()
    [command] = re.findall(r"one rank's command:\n +(.*seed0.*)", text)
    assert shlex.split(command)[1:] == ["-m", "spd_launch.task", str(launch), "tms_5-2-seed0-0000"]
    assert text.endswith("dry run: nothing written, nothing sent\n")


def test_packed_runs_are_said_to_share_cores(tmp_path: Path, capsys) -> None:
    packed = ["seed=0,1,2", "launch.pack=2"]
    text = shown(tmp_path / "out", capsys, *CPU, *packed, "cluster.cpus_per_task=6")
    assert "launch.pack: 2 runs share one array task, each on 3 core(s)" in text
    _, runs = scripts(text)
    assert "#SBATCH --array=0-1%2" in runs and "export OMP_NUM_THREADS=3" in runs
    text = shown(tmp_path / "out", capsys, *LOCAL, *packed, "launch.snapshot=off")
    assert "launch.pack: 2 runs at a time here, each on 1 core(s)" in text


def test_steps_are_shown_with_what_they_wait_for(tmp_path: Path, capsys) -> None:
    then = "launch.then=[evaluate,report]"
    text = shown(tmp_path / "out", capsys, *CPU, "seed=0,1", then)
    waits = [[x.split("=")[1] for x in script if "--dependency" in x] for script in scripts(text)]
    assert waits == [[], ["afterok:JOB1"], ["aftercorr:JOB2"], ["afterok:JOB3"]]


def test_here_there_is_no_script(tmp_path: Path, capsys) -> None:
    text = shown(tmp_path / "out", capsys, *LOCAL, "launch.snapshot=off")
    assert scripts(text) == [] and f"SPD_CODE={shlex.quote(str(ROOT))}" in text
    assert "cluster=local, here: 1 run(s), each 1 node(s) x 1 process(es)" in text


def test_a_missing_setup_file_is_named(tmp_path: Path, capsys) -> None:
    with pytest.raises(LaunchError, match=r"cluster\.setup=modlues\.sh: .*valid: "):
        shown(tmp_path / "out", capsys, *CPU, "cluster.setup=modlues.sh")


def test_a_sweep_file_is_shown(tmp_path: Path) -> None:
    done = run(
        "spd_launch", "+sweep=tms_sparsity", "cluster=cpu", "launch.dry_run=true", out=tmp_path
    )
    assert done.returncode == 0 and "30 run(s)" in done.stdout and not list(tmp_path.iterdir())
    assert "--job-name=DRYRUN-tms_sparsity-0000" in done.stdout
