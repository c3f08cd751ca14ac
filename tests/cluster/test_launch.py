"""The launcher on a real Slurm: jobs, nodes, arrays, preemption, time limits, kills, snapshots."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, wait_for

from spd_analysis.summary import final_metrics
from spd_core.run_dir import Status, read_status
from spd_launch import ledger
from spd_launch.ledger import LaunchDir
from spd_launch.plan import Task

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    "+experiment=tms_5-2", "train.steps=20", "train.batch_size=64",
    "eval.batch_size=64", "eval.steps=1", "eval.every=10", "eval.slow_every=20",
    "track.log_every=10",
    "target.steps=1000", "target.batch_size=512", "cluster=cpu", "cluster.time_min=5",
]  # fmt: skip
LONG = ["train.steps=4000", "eval.every=2000", "eval.slow_every=4000", "checkpoint.every_steps=200"]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working tree as a repository of its own, in a path with a space."""
    project = tmp_path_factory.mktemp("project") / "my spd"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, project / name)
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    return project


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of results, so that the target is trained once."""
    return tmp_path_factory.mktemp("results") / "out"


@pytest.fixture
def command(slurm: Cluster, project: Path, out: Path) -> Command:
    ours = {"SPD_OUT_DIR": out, "PYTHONPATH": project, "SLURM_CONF": slurm.conf}
    env = {**os.environ, **{name: str(path) for name, path in ours.items()}}

    def run(module: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(
            line, cwd=project, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def launch(command: Command, out: Path) -> Callable[..., tuple[LaunchDir, list[Task]]]:
    def run(*arguments: str) -> tuple[LaunchDir, list[Task]]:
        command("spd_launch", *SMALL, *arguments)
        folder = ledger.find_launch("latest", out)
        return folder, ledger.read_tasks(folder)

    return run


def status(folder: LaunchDir, task: Task) -> Status:
    found = read_status(folder.run_dir(task.run_id))
    assert found is not None
    return found


def log(folder: LaunchDir, rank: int = 0) -> str:
    return "".join(f.read_text() for f in sorted(folder.logs.glob(f"*_{rank}_log.out")))


def wait_until(folder: LaunchDir, task: Task, state: str, seconds: float = 120) -> None:
    try:
        wait_for(
            lambda: status(folder, task).state == state, seconds, f"{task.run_id} to be {state}"
        )
    except TimeoutError:
        pytest.fail(f"{status(folder, task)}\n{log(folder)}")


def wait_for_steps(folder: LaunchDir, task: Task) -> None:
    """Until it trains; the first line of metrics comes with the first steps."""
    metrics = folder.run_dir(task.run_id).metrics_file
    wait_for(
        lambda: metrics.exists() and '"step": 10' in metrics.read_text(), 90, "training to begin"
    )


def test_one_job(command: Command, out: Path, slurm: Cluster) -> None:
    shown = command("spd_launch", *SMALL).stdout
    folder = ledger.find_launch("latest", out)
    [task] = ledger.read_tasks(folder)
    [job] = ledger.latest_jobs(folder).values()
    for needed in (
        f"job {job}",
        str(folder.logs),
        "spd_launch.logs",
        "spd_launch.resume",
        "spd_launch.cancel",
    ):
        assert needed in shown
    wait_until(folder, task, "finished")
    assert status(folder, task).host in slurm.nodes
    wait_for(lambda: slurm.state(job) == "COMPLETED", 60, "the job to end")
    assert folder.run_dir(task.run_id).report_file.exists()
    assert "finished" in command("spd_launch.status", "latest").stdout
    assert "report.html" in command("spd_launch.logs", "latest").stdout
    assert "nothing to resume" in command("spd_launch.resume", "latest").stdout


def test_two_nodes_give_the_result_of_one_process(
    launch: Callable[..., tuple[LaunchDir, list[Task]]], slurm: Cluster
) -> None:
    folder, [task] = launch("dp=4", "cluster.nodes=2", "cluster.gpus_per_node=2")
    alone_folder, [alone] = launch("cluster=local", "dp=1")
    assert status(alone_folder, alone).state == "finished"
    wait_until(folder, task, "finished")
    shown = slurm.run("scontrol", "show", "job", *ledger.latest_jobs(folder).values())
    assert "NumNodes=2" in shown and "NumTasks=4" in shown
    one = final_metrics(alone_folder.run_dir(alone.run_id))
    four = final_metrics(folder.run_dir(task.run_id))
    assert set(one) == set(four)
    for name in one:
        if not re.search("cost|per_s|time", name):
            assert four[name] == pytest.approx(one[name], abs=1e-4, nan_ok=True), name


def test_a_multirun_is_one_array(launch: Callable[..., tuple[LaunchDir, list[Task]]]) -> None:
    folder, tasks = launch("-m", "seed=0,1,2", "launch.max_parallel=2")
    jobs = ledger.latest_jobs(folder)
    assert len({job.split("_")[0] for job in jobs.values()}) == 1
    assert sorted(job.split("_")[1] for job in jobs.values()) == ["0", "1", "2"]
    for task in tasks:
        wait_until(folder, task, "finished")
        assert status(folder, task).job_id == jobs[task.run_id]


def test_a_preempted_run_saves_and_finishes(
    launch: Callable[..., tuple[LaunchDir, list[Task]]], slurm: Cluster
) -> None:
    folder, [task] = launch(*LONG, "cluster.partition=scavenge")
    wait_for_steps(folder, task)
    other = slurm.submit("-p", "main", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    wait_until(folder, task, "stopped", 60)
    stopped_at = status(folder, task).step
    assert 0 < stopped_at < 4000
    wait_for(lambda: slurm.state(other) == "COMPLETED", 120, "the higher job to run")
    wait_until(folder, task, "finished", 240)
    assert status(folder, task).attempt == 2
    assert f"continuing from step {stopped_at}" in log(folder)


def test_a_run_outlives_its_time_limit(
    launch: Callable[..., tuple[LaunchDir, list[Task]]], command: Command
) -> None:
    folder, [task] = launch(
        *LONG,
        "train.steps=1000000",  # more than any machine does in a minute
        "cluster.time_min=1",
        "cluster.signal_delay_s=15",
        "dp=2",
    )
    wait_until(folder, task, "stopped", 150)
    stopped_at = status(folder, task).step
    wait_for(lambda: status(folder, task).attempt == 2, 180, "the second attempt")
    wait_for(lambda: status(folder, task).step > stopped_at, 60, "steps of the second attempt")
    assert "saved; requeued, 1 of 20" in log(folder)
    assert f"continuing from step {stopped_at}" in log(folder)
    [job] = ledger.latest_jobs(folder).values()
    assert status(folder, task).job_id == job
    command("spd_launch.cancel", "latest")


def test_requeues_are_bounded(
    launch: Callable[..., tuple[LaunchDir, list[Task]]], slurm: Cluster
) -> None:
    limits = ("cluster.time_min=1", "cluster.signal_delay_s=45", "launch.max_requeues=0")
    folder, [task] = launch(*LONG, "train.steps=1000000", *limits)
    wait_until(folder, task, "stopped", 120)
    [job] = ledger.latest_jobs(folder).values()
    wait_for(lambda: slurm.state(job) == "FAILED", 60, "the job to fail")
    assert "not requeued again" in log(folder)


def test_the_snapshot_is_the_dirty_tree_and_deaf(
    launch: Callable[..., tuple[LaunchDir, list[Task]]], project: Path, slurm: Cluster
) -> None:
    package, untracked = project / "spd_launch/__init__.py", project / "spd_launch/extra.py"
    subprocess.run(["git", "add", "-A"], cwd=project, check=True)
    person = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *person, "commit", "-qm", "all"], cwd=project, check=True)
    original = package.read_text()
    package.write_text(original + "from spd_launch import extra\n")
    untracked.write_text("import os\nif 'SLURM_PROCID' in os.environ:\n    print('EDIT ONE')\n")
    try:
        folder, [task] = launch("+cluster.sbatch.hold=true")
    finally:
        package.write_text(original + "print('EDIT TWO')\n")
        untracked.unlink()
    slurm.run("scontrol", "release", *ledger.latest_jobs(folder).values())
    wait_until(folder, task, "finished")
    package.write_text(original)
    assert "EDIT ONE" in log(folder) and "EDIT TWO" not in log(folder)


def test_a_killed_task_ends_its_job_and_resume_finishes_it(
    launch: Callable[..., tuple[LaunchDir, list[Task]]], command: Command, slurm: Cluster
) -> None:
    folder, [task] = launch(*LONG, "dp=2")
    wait_for_steps(folder, task)
    assert "1 still live" in command("spd_launch.resume", "latest").stdout
    os.kill(pid_of_rank(folder, 1), signal.SIGKILL)
    [job] = ledger.latest_jobs(folder).values()
    wait_for(lambda: slurm.state(job) == "FAILED", 90, "the job to fail")
    command("spd_launch.resume", "latest")
    wait_until(folder, task, "finished", 240)
    assert status(folder, task).attempt == 2
    assert ledger.latest_jobs(folder)[task.run_id] != job


def pid_of_rank(folder: LaunchDir, rank: int) -> int:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = str(folder.logs).encode() in (process / "cmdline").read_bytes()
            if ours and f"SLURM_PROCID={rank}".encode() in (process / "environ").read_bytes().split(
                b"\0"
            ):
                return int(process.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    raise AssertionError(f"no process of rank {rank}")


FAILING = """
from spd_core.component_model import ComponentModel
from spd_core.data.batches import Batch
from spd_core.losses.distance import LossParts


def loss(model: ComponentModel, batch: Batch, *, at: int) -> LossParts:
    if batch.randomness.step == at and batch.randomness.part == 3:
        raise ArithmeticError("rank 3 has had enough")
    return batch.target_out.sum() * 0, 1
"""


def test_a_rank_that_fails_ends_the_others_with_its_error(
    launch: Callable[..., tuple[LaunchDir, list[Task]]], project: Path, slurm: Cluster
) -> None:
    (project / "failing.py").write_text(FAILING)
    loss = "losses.failing={path: failing.loss, coeff: 1.0, at: 12}"
    folder, [task] = launch("dp=4", "cluster.nodes=2", "cluster.gpus_per_node=2", loss)
    wait_for_steps(folder, task)
    [job] = ledger.latest_jobs(folder).values()
    wait_for(lambda: slurm.state(job) == "FAILED", 60, "the job to end")
    wait_until(folder, task, "failed")
    first = r"rank 3 on node\d failed first: ArithmeticError: rank 3 has had enough"
    wait_for(lambda: re.search(first, log(folder)) is not None, 60, "rank 0 to say why")
    wait_for(lambda: status(folder, task).step == 12, 10, "the step that was reached")


def test_a_cancelled_run_stays_cancelled(
    launch: Callable[..., tuple[LaunchDir, list[Task]]], command: Command, slurm: Cluster
) -> None:
    folder, [running] = launch(*LONG)
    wait_for_steps(folder, running)
    assert "cancelled 1 live run(s)" in command("spd_launch.cancel", "latest").stdout
    [job] = ledger.latest_jobs(folder).values()
    assert slurm.state(job) == "CANCELLED"
    assert status(folder, running).state == "cancelled"
    assert list(folder.run_dir(running.run_id).checkpoints.iterdir())  # it saved on its way out


def test_a_missing_partition_is_slurms_own_error(
    command: Command, out: Path, slurm: Cluster
) -> None:
    before = sorted(out.rglob("*"))
    done = command("spd_launch", *SMALL, "cluster.partition=mian", code=2)
    assert (
        "invalid partition" in done.stderr
        and "did you mean main? valid: main, scavenge" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert sorted(out.rglob("*")) == before
    assert not slurm.run("squeue", "-h", "-o", "%T", "-t", "PENDING,RUNNING")
