"""Runs that share an array task, on a real Slurm: failures apart, signals to all, one cancelled."""

from pathlib import Path

import pytest
from cluster import Cluster, Command, Launch, status, until, wait_for, wait_until

from spd_launch import ledger, slurm_state
from spd_launch.ledger import LaunchDir
from spd_launch.plan import Task
from spd_launch.run_record import read_status

pytestmark = pytest.mark.usefixtures("target")


def wait_for_evaluation(folder: LaunchDir, task: Task, state: str) -> None:
    [row] = [r for r in ledger.read_rows(folder) if r.name == f"evaluate-{task.run_id}"]

    def is_so() -> bool:
        found = read_status(folder.folder(row))
        return found is not None and found.state == state

    wait_for(is_so, 120, f"{row.name} to be {state}")


def wait_for_job(slurm: Cluster, job: str, state: str) -> None:
    wait_for(lambda: slurm.state(job) == state, 60, f"job {job} to be {state}")


def test_runs_fail_apart_and_only_what_failed_is_resumed(
    launch: Launch, command: Command, slurm: Cluster, go: Path
) -> None:
    arguments = ["-m", "seed=0,1,2", "launch.pack=2", "launch.then=[evaluate]", until(go, "fail")]
    folder, [good, bad, alone] = launch(*arguments)
    jobs = ledger.latest_jobs(folder)
    array = jobs[good.run_id].split("_")[0]
    assert [jobs[t.run_id] for t in (good, bad, alone)] == [f"{array}_{i}" for i in (0, 0, 1)]
    for task, state in (bad, "failed"), (good, "finished"), (alone, "finished"):
        wait_until(folder, task, state)
    wait_for_job(slurm, f"{array}_0", "FAILED")
    wait_for_job(slurm, f"{array}_1", "COMPLETED")
    for task, state in (good, "finished"), (alone, "finished"), (bad, "failed"):
        wait_for_evaluation(folder, task, state)
    assert "ArithmeticError: not yet" in command("spd_launch.logs", "latest", "1").stdout
    assert "not yet" not in (folder.logs / f"{array}_0_0_log.out").read_text()

    go.touch()
    assert "1 run(s) and 1 step(s)" in command("spd_launch.resume", "latest").stdout
    wait_until(folder, bad, "finished")
    wait_for_evaluation(folder, bad, "finished")
    assert [status(folder, t).attempt for t in (good, bad, alone)] == [1, 2, 1]


def test_all_are_requeued_together_and_one_is_cancelled_alone(
    launch: Launch, command: Command, slurm: Cluster, go: Path, slow: list[str]
) -> None:
    folder, [one, two] = launch("-m", "seed=0,1", "launch.pack=2", *slow)
    [job] = {*ledger.latest_jobs(folder).values()}
    for task in (one, two):
        saved = folder.run_dir(task.run_id).checkpoints / "step_10"
        wait_for(saved.exists, 120, str(saved))
    slurm.run("scancel", "--signal=USR2", job)
    for task in (one, two):
        wait_for(lambda task=task: status(folder, task).attempt == 2, 120, f"{task.run_id} again")
        wait_until(folder, task, "running")
    logs = [(folder.logs / f"{job}_{place}_log.out").read_text() for place in (0, 1)]
    assert all("saved; to be requeued, 1 of 20" in text for text in logs)

    wait_for(lambda: status(folder, two).step > 0, 60, "a step of the second attempt")
    assert "cancelled 1 live run" in command("spd_launch.cancel", "latest", "1").stdout
    assert (status(folder, one).state, status(folder, two).state) == ("running", "cancelled")
    go.touch()
    wait_until(folder, one, "finished")
    wait_for_job(slurm, job, "FAILED")
    assert "1 run(s)" in command("spd_launch.resume", "latest").stdout
    wait_until(folder, two, "finished")
    assert [status(folder, t).attempt for t in (one, two)] == [2, 3]


def test_with_a_run_that_waits_go_no_others_of_its_array(launch: Launch, command: Command) -> None:
    later = ("+cluster.sbatch.begin=now+1hour", "launch.then=[evaluate]")
    for pack in (1, 2):
        folder, tasks = launch("-m", "seed=0,1,2,3", f"launch.pack={pack}", *later)
        jobs = ledger.latest_jobs(folder)
        assert "cancelled 2 live run(s)" in command("spd_launch.cancel", "latest", "1").stdout
        gone = (tasks[1].run_id, f"evaluate-{tasks[1].run_id}")
        left = {job for name, job in jobs.items() if name not in gone}  # a shared one stays
        assert slurm_state.live_jobs(folder.launch_id).keys() == left
        command("spd_launch.cancel", "latest")
        assert not slurm_state.live_jobs(folder.launch_id)
