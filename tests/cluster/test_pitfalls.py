"""What usually goes wrong on Slurm (docs/cluster.md), where the other files do not show it."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cluster import NO_FIGURES, SMALL, Cluster, Command, Launch, log, status, wait_for, wait_until
from slurm_cluster import namespace

from spd_launch import ledger, slurm_state
from spd_launch.ports import hashed_port

pytestmark = pytest.mark.usefixtures("target")
HOLD = "+cluster.sbatch.hold=true"


def comment(slurm: Cluster, job: str) -> str:
    return slurm.run("scontrol", "show", "job", job).split("Comment=")[1].split()[0]


LISTENS = """
import socket, sys, time
taken = socket.create_server(("", int(sys.argv[1])))
print("taken", flush=True)
time.sleep(300)
"""


def test_two_jobs_on_one_node_and_a_port_in_use(launch: Launch, slurm: Cluster) -> None:
    name = slurm.nodes[0]
    one_node = ["dp=2", f"+cluster.sbatch.nodelist={name}", HOLD]
    folder, tasks = launch("-m", "seed=0,1", "launch.if_done=rerun", *one_node)
    port = hashed_port(tasks[0].run_id, 0)
    there = ["nsenter", f"--net=/run/netns/{namespace(name)}", sys.executable]
    with subprocess.Popen([*there, "-c", LISTENS, str(port)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"taken\n"
        slurm.run("scontrol", "release", *ledger.latest_jobs(folder).values())
        for task in tasks:
            wait_until(folder, task, "finished")
        other.kill()
    ports = []
    for task in tasks:
        assert status(folder, task).host == name and status(folder, task).attempt == 1
        [meeting] = folder.run_dir(task.run_id).path.glob("meeting-*.json")
        ports.append(json.loads(meeting.read_text())["port"])
    assert ports == [port + 1, hashed_port(tasks[1].run_id, 0)]


def test_a_launch_from_inside_a_job(
    slurm: Cluster, project: Path, out: Path, tmp_path: Path
) -> None:
    words = [*SMALL, *NO_FIGURES, "seed=3"]
    script = tmp_path / "outer.sh"
    script.write_text(
        "#!/bin/sh\n#SBATCH --nodes=1 --ntasks=4 --cpus-per-task=2 --mem=1000 --time=3\n"
        "export SBATCH_PARTITION=nowhere SBATCH_TIMELIMIT=1 MASTER_PORT=1 WORLD_SIZE=7\n"
        f'cd "$PROJECT"; exec "$PYTHON" -m spd_launch {" ".join(map(repr, words))}\n'
    )
    env = {"PROJECT": project, "PYTHON": sys.executable, "PYTHONPATH": project, "SPD_OUT_DIR": out}
    export = ",".join(["ALL", *(f"{name}={value}" for name, value in env.items())])
    outer = slurm.submit(f"--output={tmp_path}/outer.log", f"--export={export}", script)
    wait_for(lambda: slurm.state(outer) in ("COMPLETED", "FAILED"), 300, "the outer job to end")
    assert slurm.state(outer) == "COMPLETED", (tmp_path / "outer.log").read_text()
    folder = ledger.find_launch("latest", out)
    [task] = ledger.read_tasks(folder)
    wait_until(folder, task, "finished")
    [job] = ledger.latest_jobs(folder).values()
    shown = slurm.run("scontrol", "show", "job", job)
    for needed in ("Partition=main", "NumTasks=1", "CPUs/Task=1", "TimeLimit=00:05:00"):
        assert needed in shown
    assert "MinMemoryNode=1000M" not in shown


def test_what_a_launch_writes_another_user_may_go_on_with(
    command: Command, slurm: Cluster, targets: Path
) -> None:
    """Of a launcher with a closed umask; the other one is a user that every system has."""
    with TemporaryDirectory(dir="/tmp") as folder:
        out = Path(folder)
        shutil.chown(out, group="games")
        out.chmod(0o2775)
        shutil.copytree(targets, out / "targets")
        before = os.umask(0o077)
        try:
            words = [*SMALL, *NO_FIGURES, f"launch.out_dir={out}"]
            command("spd_launch", *words, SPD_OUT_DIR=str(out))
        finally:
            os.umask(before)
        launched = ledger.find_launch("latest", out)
        [task] = ledger.read_tasks(launched)
        wait_until(launched, task, "finished")
        [job] = ledger.latest_jobs(launched).values()
        wait_for(lambda: slurm.state(job) == "COMPLETED", 300, "the job to end")
        as_other = ["setpriv", "--reuid=games", "--regid=games", "--clear-groups"]
        look = [*as_other, "find", str(out), "-path", f"{out}/targets", "-prune", "-o"]
        assert slurm.run(*look, "!", "-writable", "-print") == ""
        assert "status.json" in slurm.run(*look, "-print") and "_log.out" in slurm.run(
            *look, "-print"
        )


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1", "timed out"),
        ("echo Submitted; exit 0", "Submitted"),
    ],
    ids=["lost", "misread"],
)
def test_a_job_whose_number_is_not_told_is_taken_back(
    command: Command, slurm: Cluster, out: Path, tmp_path: Path, answer: str, words: str
) -> None:
    mute = tmp_path / "bin" / "sbatch"
    mute.parent.mkdir()
    mute.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@" >> {tmp_path}/sent\n{answer}\n')
    mute.chmod(0o755)
    before = sorted(out.glob("runs/*"))
    path = f"{mute.parent}:{os.environ['PATH']}"
    done = command("spd_launch", *SMALL, "seed=4", HOLD, code=2, PATH=path)
    assert words in done.stderr and "Traceback" not in done.stderr
    assert "the 1 job(s) sent before are cancelled" in done.stderr
    [sent] = (tmp_path / "sent").read_text().splitlines()
    assert slurm.state(sent.split()[-1]) == "CANCELLED"
    assert sorted(out.glob("runs/*")) == before


def test_cores_of_each_rank_and_half_a_result_of_a_killed_attempt(
    launch: Launch, slurm: Cluster
) -> None:
    asked = ["dp=2", "cluster.cpus_per_task=3", "+cluster.env.OMP_NUM_THREADS='1'"]
    folder, [task] = launch(*asked, "track.wandb.mode=offline", HOLD)
    [job] = ledger.latest_jobs(folder).values()
    half = folder.logs / f"{job}_0_result.pkl.save_tmp"
    half.write_bytes(b"half")
    slurm.run("scontrol", "release", job)
    wait_until(folder, task, "finished")
    wait_for(lambda: slurm.state(job) == "COMPLETED", 300, "the job to end")
    assert not half.exists() and half.with_suffix("").exists()
    assert comment(slurm, job) == folder.launch_id  # W&B has no URL offline
    step = ["sacct", "-nP", "-j", f"{job}.0", "-o", "AllocCPUS,NTasks"]
    wait_for(lambda: slurm.run(*step).strip() == "6|2", 300, "accounting to know the step's cores")


def test_a_line_of_the_setup_file_that_fails(
    command: Command, slurm: Cluster, project: Path, out: Path
) -> None:
    (project / "slurm_templates/setup/broken.sh").write_text("true\nmodule load nowhere\ntrue\n")
    command("spd_launch", *SMALL, "seed=5", "cluster.setup=setup/broken.sh")
    folder = ledger.find_launch("latest", out)
    [job] = ledger.latest_jobs(folder).values()
    wait_for(lambda: slurm.state(job) == "FAILED", 300, "the job to fail")
    assert "cluster.setup: line 2 ended with code 127: module load nowhere" in log(folder)

    def told() -> bool:  # by accounting, which learns of it a moment later
        return "failed, not finished" in command("spd_launch.status", "latest").stdout

    wait_for(told, 300, "accounting to know of its end")


def test_tasks_that_accounting_sums_up_and_comments_of_single_tasks(
    launch: Launch, slurm: Cluster
) -> None:
    folder, tasks = launch("-m", "seed=range(0,40)", "launch.if_done=rerun", HOLD)
    jobs = [ledger.latest_jobs(folder)[task.run_id] for task in tasks]
    array = jobs[0].split("_")[0]
    slurm_state.change_comment(jobs[0], folder.launch_id, "https://wandb.ai/x")
    slurm_state.change_comment(jobs[1], "of somebody else", "https://wandb.ai/y")
    assert comment(slurm, jobs[0]) == "https://wandb.ai/x"
    assert {comment(slurm, job) for job in jobs[1:3]} == {folder.launch_id}
    slurm.run("scancel", *(job for job in jobs[4:] if job != jobs[9]))  # one line, with a hole

    def told_apart() -> bool:
        listed = slurm.run("sacct", "-nXP", "-j", array, "-o", "JobID").split()
        ended = slurm_state.ended_jobs(jobs)
        held = [ended.get(jobs[i]) for i in (1, 2, 3, 9)]
        return f"{array}_[1-3,9%40]" in listed and held == ["PENDING"] * 4

    wait_for(told_apart, 300, "accounting to sum up four tasks")
    slurm.run("scancel", array)


def test_only_our_own_requeues_at_time_limits_are_counted(
    launch: Launch, command: Command, slurm: Cluster, slow: list[str]
) -> None:
    folder, [task] = launch(*slow, "train.steps=1000", "launch.max_requeues=1")
    [job] = ledger.latest_jobs(folder).values()
    metrics = folder.run_dir(task.run_id).metrics_file
    wait_for(metrics.exists, 300, "training to begin")
    slurm.run("scontrol", "requeue", job)  # as after a preemption
    wait_for(lambda: status(folder, task).attempt == 2, 300, "the second attempt")
    wait_for(lambda: "continuing from step" in log(folder), 300, "it to go on")
    time.sleep(1)
    slurm.run("scancel", "--signal=USR2", job)  # to its ranks, as before a time limit
    wait_for(lambda: "saved; to be requeued, 1 of 1" in log(folder), 300, "the save")
    command("spd_launch.cancel", "latest")


BROKEN = """
import socket

from spd_core.component_model import ComponentModel
from spd_core.data.batches import Batch
from spd_core.losses.distance import LossParts


def loss(model: ComponentModel, batch: Batch, *, node: str) -> LossParts:
    if socket.gethostname() == node:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return batch.target_out.sum() * 0, 1
"""


def test_a_run_goes_on_without_a_node_that_breaks_it(
    launch: Launch, command: Command, project: Path, slurm: Cluster
) -> None:
    (project / "broken.py").write_text(BROKEN)
    bad = slurm.nodes[0]
    loss = f"losses.broken={{path: broken.loss, coeff: 1.0, node: {bad}}}"
    folder, [task] = launch(loss, "cluster.requeue=off", HOLD)
    [job] = ledger.latest_jobs(folder).values()
    slurm.run("scontrol", "update", f"jobid={job}", f"reqnodelist={bad}")
    slurm.run("scontrol", "release", job)
    wait_until(folder, task, "failed")
    wait_for(lambda: slurm.state(job) == "FAILED", 60, "the job to fail")
    command("spd_launch.resume", "latest", f"--exclude={bad}")
    slurm.run("scontrol", "release", *ledger.latest_jobs(folder).values())  # held as before
    wait_until(folder, task, "finished")
    assert status(folder, task).host in slurm.nodes[1:]
    [job] = ledger.latest_jobs(folder).values()
    assert f"ExcNodeList={bad}" in slurm.run("scontrol", "show", "job", job)
