"""The launcher on a real Slurm: jobs, nodes, arrays, preemption, time limits, kills, snapshots."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_cluster
from cluster import SMALL, Cluster, Command, Launch, log, status, wait_for, wait_until

from spd_analysis.summary import final_metrics
from spd_launch import ledger
from spd_launch.ledger import LaunchDir
from spd_launch.plan import Task

pytestmark = pytest.mark.usefixtures("target")


def wait_for_steps(folder: LaunchDir, task: Task) -> None:
    """Until it trains; the first line of metrics comes with the first steps."""
    metrics = folder.run_dir(task.run_id).metrics_file
    wait_for(
        lambda: metrics.exists() and '"step": 10' in metrics.read_text(), 300, "training to begin"
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
    wait_for(lambda: slurm.state(job) == "COMPLETED", 240, "the job to end")
    assert folder.run_dir(task.run_id).report_file.exists()
    assert "finished" in command("spd_launch.status", "latest").stdout
    assert "report.html" in command("spd_launch.logs", "latest").stdout
    assert "nothing to resume" in command("spd_launch.resume", "latest").stdout


def test_two_nodes_give_the_result_of_one_process(launch: Launch, slurm: Cluster) -> None:
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


def test_a_multirun_is_one_array(launch: Launch) -> None:
    folder, tasks = launch("-m", "seed=0,1,2", "launch.max_parallel=2", "launch.if_done=rerun")
    jobs = ledger.latest_jobs(folder)
    assert len({job.split("_")[0] for job in jobs.values()}) == 1
    assert sorted(job.split("_")[1] for job in jobs.values()) == ["0", "1", "2"]
    for task in tasks:
        wait_until(folder, task, "finished")
        assert status(folder, task).job_id == jobs[task.run_id]


def test_a_preempted_run_saves_and_finishes(
    launch: Launch, slurm: Cluster, slow: list[str], go: Path
) -> None:
    folder, [task] = launch(*slow, "cluster.partition=scavenge")
    wait_for_steps(folder, task)
    other = slurm.submit("-p", "main", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    wait_until(folder, task, "stopped")
    stopped_at = status(folder, task).step
    assert 0 < stopped_at < 150
    go.touch()
    wait_for(lambda: slurm.state(other) == "COMPLETED", 240, "the higher job to run")
    wait_until(folder, task, "finished")
    assert status(folder, task).attempt == 2
    assert f"continuing from step {stopped_at}" in log(folder)


def test_a_run_outlives_its_time_limit(launch: Launch, command: Command, slow: list[str]) -> None:
    limits = ("cluster.time_min=1", "cluster.signal_delay_s=15")
    folder, [task] = launch(*slow, "train.steps=1000", *limits, "dp=2")
    wait_until(folder, task, "stopped")
    stopped_at = status(folder, task).step
    wait_for(lambda: status(folder, task).attempt == 2, 300, "the second attempt")
    wait_for(lambda: status(folder, task).step > stopped_at, 300, "steps of the second attempt")
    assert "saved; to be requeued, 1 of 20" in log(folder)
    assert f"continuing from step {stopped_at}" in log(folder)
    [job] = ledger.latest_jobs(folder).values()
    assert status(folder, task).job_id == job
    command("spd_launch.cancel", "latest")


def test_requeues_are_bounded(launch: Launch, slurm: Cluster, slow: list[str]) -> None:
    folder, [task] = launch(*slow, "launch.max_requeues=0")
    wait_for_steps(folder, task)
    [job] = ledger.latest_jobs(folder).values()
    slurm.run("scancel", "--signal=USR2", job)  # as Slurm sends it when the time limit is near
    wait_until(folder, task, "stopped")
    wait_for(lambda: slurm.state(job) == "FAILED", 240, "the job to fail")
    assert "not requeued again" in log(folder)


def test_the_snapshot_is_the_dirty_tree_and_deaf(
    launch: Launch, project: Path, slurm: Cluster
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
    launch: Launch, command: Command, slurm: Cluster, slow: list[str], go: Path
) -> None:
    folder, [task] = launch(*slow, "dp=2", "cluster.requeue=off")
    wait_for_steps(folder, task)
    assert "1 still live" in command("spd_launch.resume", "latest").stdout
    os.kill(pid_of_rank(folder, 1), signal.SIGKILL)
    [job] = ledger.latest_jobs(folder).values()
    wait_for(lambda: slurm.state(job) == "FAILED", 240, "the job to fail")
    go.touch()
    command("spd_launch.resume", "latest")
    wait_until(folder, task, "finished")
    assert status(folder, task).attempt == 2
    assert ledger.latest_jobs(folder)[task.run_id] != job


def test_a_job_whose_task_is_killed_goes_on_by_itself(
    launch: Launch, slow: list[str], go: Path
) -> None:
    folder, [task] = launch(*slow, "dp=2")
    wait_for_steps(folder, task)
    os.kill(pid_of_rank(folder, 1), signal.SIGKILL)
    go.touch()
    wait_until(folder, task, "finished")
    assert status(folder, task).attempt == 2
    assert ledger.latest_jobs(folder)[task.run_id] == status(folder, task).job_id


def test_a_node_is_lost_with_a_run_that_goes_on_there(
    launch: Launch, slurm: Cluster, slow: list[str]
) -> None:
    """Slurm starts the job elsewhere; what still works on the lost node ends, in favour of that."""
    folder, [task] = launch(*slow, "train.steps=1000")
    wait_for_steps(folder, task)
    lost = status(folder, task).host
    [slurmd] = [pid for pid, name in slurm_cluster.running(lost).items() if name == "slurmd"]
    os.kill(slurmd, signal.SIGKILL)
    try:
        wait_for(lambda: status(folder, task).attempt == 2, 300, "the second attempt")
        assert status(folder, task).host != lost
        for said in ("this job was started again elsewhere: this attempt ends", "continuing from"):
            wait_for(lambda said=said: said in log(folder), 180, said)
    finally:
        slurm_cluster.start(lost, "slurmd", "-D", "-N", lost)
        slurm.run("scancel", "--name", folder.launch_id)


def test_a_controller_that_is_down_is_asked_again(
    launch: Launch, slurm: Cluster, slow: list[str], go: Path
) -> None:
    folder, [task] = launch(*slow)
    wait_for_steps(folder, task)
    slurm.stop_controller()
    try:
        os.kill(pid_of_rank(folder, 0), signal.SIGUSR2)
        asked = "saved; to be requeued", "Unable to contact slurm controller"
        wait_for(lambda: all(said in log(folder) for said in asked), 180, "it to ask in vain")
        assert status(folder, task).state == "stopped"
    finally:
        slurm.start_controller()
    go.touch()
    wait_for(lambda: status(folder, task).attempt == 2, 300, "the second attempt")
    wait_until(folder, task, "finished")


def pid_of_rank(folder: LaunchDir, rank: int) -> int:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
            ours = line.startswith(sys.executable.encode()) and str(folder.logs).encode() in line
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
    if batch.randomness.step == at and batch.randomness.part == 1:
        raise ArithmeticError("rank 1 has had enough")
    return batch.target_out.sum() * 0, 1
"""


def test_a_rank_that_fails_on_another_node_ends_the_job_with_its_error(
    launch: Launch, project: Path, slurm: Cluster
) -> None:
    (project / "failing.py").write_text(FAILING)
    loss = "losses.failing={path: failing.loss, coeff: 1.0, at: 12}"
    folder, [task] = launch("dp=2", "cluster.nodes=2", "cluster.gpus_per_node=1", loss)
    wait_for_steps(folder, task)
    [job] = ledger.latest_jobs(folder).values()
    wait_for(lambda: slurm.state(job) == "FAILED", 400, "the job to fail of the same twice")
    wait_until(folder, task, "failed")
    assert status(folder, task).attempt == 2
    first = r"rank 1 on node\d+ failed first: ArithmeticError: rank 1 has had enough"
    wait_for(lambda: re.search(first, log(folder)) is not None, 180, "rank 0 to say why")
    wait_for(lambda: status(folder, task).step == 12, 60, "the step that was reached")


def test_a_cancelled_run_stays_cancelled(
    launch: Launch, command: Command, slurm: Cluster, slow: list[str]
) -> None:
    folder, [running] = launch(*slow)
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
