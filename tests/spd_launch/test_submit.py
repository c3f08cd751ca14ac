"""What Slurm would be told; that Slurm takes it is seen in tests/cluster."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch_configs import STORED, config
from submitit.slurm.slurm import _make_sbatch_string

from spd_launch import local
from spd_launch.config import JobConfig
from spd_launch.errors import LaunchError
from spd_launch.ledger import LaunchDir
from spd_launch.plan import make_plan
from spd_launch.submit import _copy_setup, _outside_of_jobs, job_parameters
from spd_launch.task import STOPPED, Stop, place_from_environment


def script(folder: Path, *runs: JobConfig, n_arrays: int = 1, dependency: str | None = None) -> str:
    plan = make_plan([({"seed": str(i)}, run) for i, run in enumerate(runs)], "now", "ab12", STORED)
    launch = LaunchDir(folder / plan.launch_id)
    parameters = job_parameters(launch, plan.arrays[0], Path("/the code"), n_arrays, dependency)
    n = len(plan.arrays[0].elements)
    return _make_sbatch_string("COMMAND", launch.logs, map_count=n, **parameters)


def test_two_gpu_nodes(tmp_path: Path) -> None:
    run = config("default", dp=16, cluster__mem_per_task_gb=64)
    lines = script(tmp_path, run).splitlines()
    asked = "nodes=2 ntasks-per-node=8 gpus-per-node=8 cpus-per-task=8 mem=524288M time=1440"
    for option in (*asked.split(), "signal=USR2@120", "requeue", "open-mode=append"):
        assert f"#SBATCH --{option}" in lines
    srun = next(line for line in lines if line.startswith("srun"))
    for option in ("--kill-on-bad-exit=1", "--wait=60", "--open-mode=append", "--cpus-per-task=8"):
        assert option in shlex.split(srun)
    assert "export PYTHONPATH='/the code" in "\n".join(lines)


def test_no_gpu_is_asked_for_on_cpu_or_beside_the_profiles_own_gres(tmp_path: Path) -> None:
    assert "#SBATCH --gpu" not in script(tmp_path, config("cpu"))
    own = script(tmp_path, config("default", cluster__sbatch={"gres": "gpu:a100:1", "hold": False}))
    assert "gpus-per-node" not in own and "#SBATCH --gres=gpu:a100:1" in own and "hold" not in own


def test_arrays_share_max_parallel(tmp_path: Path) -> None:
    runs = [config(seed=seed, launch__max_parallel=7) for seed in range(9)]
    assert "--array=0-8%7" in script(tmp_path, *runs)
    assert "--array=0-8%2" in script(tmp_path, *runs, n_arrays=3)
    assert "--array=0-8%1" in script(tmp_path, *runs, n_arrays=20)


def test_packed_runs_share_what_one_is_given(tmp_path: Path) -> None:
    runs = [config("default", seed=seed, launch__pack=3) for seed in range(8)]
    lines = script(tmp_path, *runs).splitlines()
    asked = "nodes=1 ntasks-per-node=3 gpus-per-node=1 cpus-per-task=2 array=0-2%3"  # of 8 cores
    assert {f"#SBATCH --{option}" for option in asked.split()} < {*lines}
    assert "export OMP_NUM_THREADS=2" in lines
    srun = shlex.split(next(line for line in lines if line.startswith("srun")))
    assert {"--kill-on-bad-exit=0", "--wait=0", "--cpus-per-task=2"} < {*srun}


def test_a_run_after_its_target_is_given_up_where_the_target_fails(tmp_path: Path) -> None:
    lines = script(tmp_path, config(), dependency="afterok:12_3").splitlines()
    assert {"#SBATCH --dependency=afterok:12_3", "#SBATCH --kill-on-invalid-dep=yes"} < {*lines}
    own = config(cluster__sbatch={"dependency": "afterany:7"})
    assert "#SBATCH --dependency=afterok:12_3,afterany:7" in script(
        tmp_path, own, dependency="afterok:12_3"
    )
    assert "#SBATCH --dependency=afterany:7" in script(tmp_path, own)
    assert "dependency" not in script(tmp_path, config())


def test_the_setup_file_is_frozen_with_the_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = tmp_path / "slurm_templates" / "mine.sh"
    setup.parent.mkdir()
    setup.write_text("module load x\n")
    monkeypatch.chdir(tmp_path)
    run = config(cluster__setup="mine.sh")
    launch = LaunchDir(tmp_path / "out put" / "now-tms_5-2-ab12")
    _copy_setup(launch, run.cluster)
    setup.write_text("edited\n")
    _copy_setup(launch, run.cluster)
    line = next(x for x in script(launch.path.parent, run).splitlines() if x.startswith("source"))
    assert Path(shlex.split(line)[1]).read_text() == "module load x\n"
    with pytest.raises(LaunchError, match=r"did you mean mine\.sh"):
        _copy_setup(launch, config(cluster__setup="mien.sh").cluster)


@pytest.mark.parametrize(
    ("lines", "code", "words"),
    [
        ("false || true\nif false; then :; fi\nMINE=1\n", 0, "MINE=1"),
        (
            "echo\nmodule load nowhere\nMINE=1\n",
            1,
            "line 2 ended with code 127: module load nowhere",
        ),
        ("MINE=1\nfalse\n", 1, "line 2 ended with code 1: false"),
    ],
    ids=["fine", "in the middle", "at the end"],
)
def test_a_line_of_the_setup_file_that_fails_ends_the_job_and_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, code: int, words: str
) -> None:
    (tmp_path / "slurm_templates").mkdir()
    (tmp_path / "slurm_templates/mine.sh").write_text(lines)
    monkeypatch.chdir(tmp_path)
    run = config(cluster__setup="mine.sh")
    launch = LaunchDir(tmp_path / "out put" / "now-tms_5-2-ab12")
    _copy_setup(launch, run.cluster)
    before = script(launch.path.parent, run).split("# command")[0]
    done = subprocess.run(
        ["bash", "-c", f"{before}\nfalse\necho MINE=$MINE"], capture_output=True, text=True
    )
    assert done.returncode == code
    assert words in (done.stdout if code == 0 else done.stderr)


def test_an_enclosing_job_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SLURM_JOB_ID",
        "SLURM_CONF",
        "SBATCH_PARTITION",
        "SRUN_CPUS_PER_TASK",
        "RANK",
        "MASTER_ADDR",
        "SLURMD_NODENAME",
    ):
        monkeypatch.setenv(name, "1")
    with _outside_of_jobs():
        assert "SLURM_CONF" in os.environ
        assert not {
            "SLURM_JOB_ID",
            "SBATCH_PARTITION",
            "SRUN_CPUS_PER_TASK",
            "RANK",
            "MASTER_ADDR",
            "SLURMD_NODENAME",
        } & set(os.environ)
    assert os.environ["SLURM_JOB_ID"] == "1"


def test_place_of_an_array_task(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"PROCID": 3, "NTASKS": 4, "LOCALID": 1, "JOB_NUM_NODES": 2, "JOB_ID": 99,
           "ARRAY_JOB_ID": 90, "ARRAY_TASK_ID": 7, "RESTART_COUNT": 2}  # fmt: skip
    for name, value in env.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    place = place_from_environment("slurm")
    assert (place.rank, place.world_size, place.local_rank, place.job_id, place.restart) == (
        3,
        4,
        1,
        "90_7",
        2,
    )


def test_a_termination_outranks_the_time_limit() -> None:
    old = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
    try:
        stop = Stop()
        assert not stop()
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        assert stop() and stop.signal == signal.SIGTERM
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def python(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code])


def test_a_local_rank_that_dies_ends_the_others() -> None:
    ranks = [python("import time; time.sleep(60)"), python("import os; os._exit(3)")]
    assert local._wait(ranks) == 3
    assert all(rank.returncode is not None for rank in ranks)
    assert local._wait([python(""), python(f"import os; os._exit({STOPPED})")]) == STOPPED
