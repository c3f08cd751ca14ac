import os
import subprocess
import sys
import time

import pytest

from spd_analysis.processes import joined, run_here

PROGRAM = r"""
import sys
import time
import torch
from spd_analysis.processes import joined
from spd_core.distributed import all_reduce

with joined("cpu") as dist:
    if "fail" in sys.argv:
        time.sleep(0 if dist.rank else 60)
        sys.exit(7)
    total = all_reduce("sum", torch.tensor(10.0 ** dist.rank), dist)
    # One write: lines of several processes in one file must not mix.
    sys.stdout.write(f"rank {dist.rank} of {dist.world_size} got {int(total)}\n")
    sys.stdout.flush()
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "a_program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return "a_program"


def test_processes_here_meet(program, capfd):
    assert run_here(3, program, []) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == [
        f"rank {rank} of 3 got 111" for rank in range(3)
    ]


def test_one_that_fails_ends_the_others_with_its_code(program):
    started = time.monotonic()
    assert run_here(2, program, ["fail"]) == 7
    assert time.monotonic() - started < 60


def test_the_tasks_of_an_srun_meet_on_its_first_node(program, tmp_path, monkeypatch):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames h[1-2]" ] && echo 127.0.0.1 && echo h2\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "h[1-2]"}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", program],
            env={**os.environ, **step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    out = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    assert out == ["rank 0 of 2 got 11", "rank 1 of 2 got 11"]


@pytest.mark.parametrize("environment", [
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # in a batch script, outside of any srun
    {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},  # a step that follows runs here
])  # fmt: skip
def test_alone(environment, monkeypatch):
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with joined("cpu") as dist:
        assert (dist.rank, dist.world_size) == (0, 1)
