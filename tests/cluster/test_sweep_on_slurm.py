"""Sweeps on a real Slurm: short arrays, runs left out, refusals and interruptions half way."""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import NO_FIGURES, SMALL, Cluster, Command, until, wait_for

from spd_launch import ledger

SWEEP = """
global: {grid: {seed: [0, 1, 2, 3, 4]}}
experiments: {tms_5-2: }
"""


pytestmark = pytest.mark.usefixtures("target")


@pytest.fixture(scope="module", autouse=True)
def _sweep(project: Path) -> None:
    (project / "sweeps" / "seeds.yaml").write_text(SWEEP)


@contextmanager
def longest_array(limit: int, slurm: Cluster) -> Iterator[None]:
    """MaxArraySize of this cluster; it takes a new controller."""

    def restart(conf: str) -> None:
        slurm.stop_controller()
        slurm.conf.write_text(conf)
        slurm.start_controller()

    before = slurm.conf.read_text()
    restart(re.sub(r"MaxArraySize=\d+", f"MaxArraySize={limit}", before))
    try:
        yield
    finally:
        restart(before)


def queue(slurm: Cluster) -> list[str]:
    return slurm.run("squeue", "-h", "-r", "-o", "%i").split()


def test_a_sweep_in_arrays_as_long_as_the_cluster_allows(
    command: Command, out: Path, slurm: Cluster
) -> None:
    arguments = [*SMALL, *NO_FIGURES, "+sweep=seeds", "launch.max_parallel=3"]
    with longest_array(2, slurm):
        dry = command("spd_launch", *arguments, "launch.dry_run=true").stdout
        done = command("spd_launch", *arguments, "launch.wait=true")
    folder = ledger.find_launch("latest", out)
    jobs = list(ledger.latest_jobs(folder).values())
    arrays = list(dict.fromkeys(job.split("_")[0] for job in jobs))
    assert [jobs.index(f"{arrays[0]}_1"), len(arrays), jobs[4]] == [1, 3, arrays[2]]
    # The dry run said word for word what was sent.
    shown = re.findall(r"---- JOB\d: .*\n(#!(?:.|\n)*?)\n----", dry)
    sent = [(folder.logs / f"{array}_submission.sh").read_text().rstrip() for array in arrays]
    assert [x.replace("DRYRUN-seeds-0000", folder.launch_id) for x in shown] == sent
    assert "#SBATCH --array=0-1%1" in sent[0]  # three arrays share three places
    # It was waited for, in lines that a log file can hold.
    assert "5 finished" in done.stdout and "\033[" not in done.stdout
    assert f"{folder.launch_id}  (slurm)  5 run(s): 5 finished" in done.stdout
    again = command("spd_launch", *arguments).stdout
    assert "skipping 5 of 5 finished before" in again and again.endswith("nothing to do\n")
    assert queue(slurm) == []


def test_waiting_ends_with_code_1_when_a_run_failed(
    out: Path, project: Path, slurm: Cluster, go: Path
) -> None:
    """In a terminal, with the live table, which shows them as they run."""
    env = {**os.environ, "SPD_OUT_DIR": str(out), "PYTHONPATH": str(project), "COLUMNS": "150"}
    runs = ["-m", "seed=1", "train.lr.start=1e-3,1e30", until(go, "wait"), "launch.if_done=rerun"]
    arguments = [*SMALL, *NO_FIGURES, *runs, "launch.wait=true"]
    mine, theirs = pty.openpty()
    waiting = subprocess.Popen(
        [sys.executable, "-m", "spd_launch", *arguments],
        cwd=project, env={**env, "TERM": "xterm"}, stdin=subprocess.DEVNULL, stdout=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = ""
    for said in iter(lambda: read(mine), ""):
        shown += said
        if "│ running" in shown:
            go.touch()
    assert waiting.wait(timeout=180) == 1
    assert "tms_5-2-seed1-start1e30" in shown and "│ running" in shown, shown
    assert "1 finished, 1 failed" in shown or "1 failed, 1 finished" in shown
    [failed] = [
        job for run, job in ledger.latest_jobs(ledger.find_launch("latest", out)).items()
        if "start1e30" in run
    ]  # fmt: skip
    told = slurm.run("scontrol", "show", "job", failed)
    assert "JobState=FAILED" in told and "ExitCode=1:0" in told


def read(terminal: int) -> str:
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:  # the other side was closed
        return ""


def test_one_array_refused_takes_the_others_back(command: Command, slurm: Cluster) -> None:
    arguments = [*SMALL, "-m", "cluster.partition=main,mian", "launch.if_done=rerun"]
    done = command("spd_launch", *arguments, "+cluster.sbatch.hold=true", code=2)
    assert "invalid partition" in done.stderr and "did you mean main?" in done.stderr
    assert "the 1 job(s) sent before are cancelled" in done.stderr
    assert queue(slurm) == []
    shown = command("spd_launch.status", "latest").stdout
    assert "1 of these were not sent" in shown and "spd_launch.resume" in shown


def test_a_launch_that_is_ended_as_it_sends_takes_back_what_it_sent(
    project: Path, out: Path, slurm: Cluster, tmp_path: Path
) -> None:
    """As it sends the first of two arrays: an sbatch that takes its time before and after."""
    real = subprocess.check_output(["which", "sbatch"], text=True).strip()
    slow = tmp_path / "bin" / "sbatch"
    slow.parent.mkdir()
    asked, answer = tmp_path / "asked", tmp_path / "answer"
    waits = f"until [ -e {answer} ]; do sleep 0.1; done"
    slow.write_text(f'#!/bin/bash\ntouch {asked}; {waits}; {real} "$@" && sleep 1\n')
    slow.chmod(0o755)
    env = {**os.environ, "SPD_OUT_DIR": str(out), "PYTHONPATH": str(project)}
    env["PATH"] = f"{slow.parent}:{env['PATH']}"
    arguments = [*SMALL, "-m", "dp=1,2", "launch.if_done=rerun", "+cluster.sbatch.hold=true"]
    for ending, code in {signal.SIGTERM: 130, signal.SIGINT: 130, signal.SIGKILL: -9}.items():
        sending = subprocess.Popen(
            [sys.executable, "-m", "spd_launch", *arguments],
            cwd=project, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        wait_for(asked.exists, 180, "the first sbatch")
        if ending == signal.SIGINT:  # from a terminal it reaches sbatch as well
            os.killpg(sending.pid, ending)
        else:
            sending.send_signal(ending)
        answer.touch()
        _, said = sending.communicate(timeout=180)
        assert sending.returncode == code, said
        asked.unlink()
        if ending != signal.SIGKILL:
            answer.unlink()
        if ending != signal.SIGKILL:
            assert "the 1 job(s) sent before are cancelled" in said and queue(slurm) == []
    # Nobody could take that one back: status knows, and cancel ends it.
    [lost] = wait_for(lambda: queue(slurm), 180, "what is sent after all")
    run = [sys.executable, "-m"]
    shown = subprocess.check_output([*run, "spd_launch.status", "latest"], env=env, cwd=project)
    assert f"in no file of this launch: {lost}" in shown.decode()
    said = subprocess.check_output([*run, "spd_launch.cancel", "latest"], env=env, cwd=project)
    assert "cancelled 1 job(s) that stood in no file" in said.decode()
    assert queue(slurm) == [], slurm.run("scontrol", "show", "job")


def test_a_bad_run_of_many_sends_nothing(command: Command, slurm: Cluster) -> None:
    many = ["-m", "seed=range(0,250)", "train.batch_size=64,63", "dp=2"]
    done = command("spd_launch", *SMALL, *many, code=2)
    assert "250 of 500 runs cannot be, so none was sent" in done.stderr
    assert "seed=0 train.batch_size=63" in done.stderr and queue(slurm) == []
