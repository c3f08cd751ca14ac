"""Targets as jobs of their own, which decompositions wait for, on a real Slurm."""

import json
import re

from cluster import SMALL, Cluster, Command, Launch, log, status, wait_for, wait_until

from spd_launch import ledger
from spd_launch.ledger import LaunchDir
from spd_launch.plan import Task

LM = [
    "+experiment=ss_llama_simple-1L", "data=stories", "size=small", "dp=2", "target.steps=100000",
    "data.n_documents=300", "data.vocab_size=300", "data.seq_len=16", "target.d_model=16",
    "target.d_mlp=16", "target.batch_size=4",
]  # fmt: skip
HELD = "+cluster.sbatch.hold=true"  # nothing starts before it is looked at


def log_of(folder: LaunchDir, task: Task) -> str:
    file = folder.logs / f"{ledger.latest_jobs(folder)[task.run_id]}_0_log.out"
    return file.read_text() if file.exists() else ""


def waits_for(slurm: Cluster, job: str) -> str:
    return slurm.run("squeue", "-h", "-j", job, "-o", "%E").strip()


def test_runs_come_after_the_one_job_that_trains_their_target(
    launch: Launch, command: Command, slurm: Cluster
) -> None:
    folder, tasks = launch("-m", "seed=0,1", HELD)
    *runs, target = tasks
    jobs = ledger.latest_jobs(folder)
    assert len(jobs) == 3 and len({job.split("_")[0] for job in jobs.values()}) == 2
    for run in runs:
        assert waits_for(slurm, jobs[run.run_id]).startswith(f"afterok:{jobs[target.run_id]}")
    assert "first comes its target" in command("spd_launch.logs", "latest", "1").stdout
    assert "live" in command("spd_launch.resume", "latest", "0").stdout
    slurm.run("scontrol", "release", *jobs.values())
    for task in tasks:
        wait_until(folder, task, "finished")
    [kept] = folder.run_dir(target.run_id).targets.glob("*/target.json")
    record = json.loads(kept.read_text())
    assert f"seed {record['seed']}" in log_of(folder, target)
    assert "the target is in" in command("spd_launch.logs", "latest", "target").stdout
    for run in runs:
        assert f"tms target of seed {record['seed']}" in log_of(folder, run)
        assert "training the target" not in log_of(folder, run)
    assert "target(s)" not in command("spd_launch", *SMALL, "launch.dry_run=true").stdout


def test_no_run_waits_for_a_target_that_failed(
    launch: Launch, command: Command, slurm: Cluster
) -> None:
    bad = ["target.steps=1", "target.n_seeds=1"]
    folder, [one, two, target] = launch("-m", "seed=0,1", *bad, HELD)
    slurm.run("scontrol", "release", *ledger.latest_jobs(folder).values())
    wait_until(folder, target, "failed")
    shown = ["squeue", "-h", "--name", folder.launch_id]
    wait_for(lambda: not slurm.run(*shown), 240, "Slurm to give the runs up")
    words = " ".join(command("spd_launch.status", "latest").stdout.split())
    assert words.count("no target ") >= 2
    assert f"{target.run_id}: failed: ValueError: no target of seeds 0 to 0 is good" in words
    assert f"so 2 run(s) did not start: {one.run_id}, {two.run_id}" in words
    assert f"spd_launch.resume {folder.launch_id}" in words
    assert status(folder, one).attempt == 0

    # With one run its target is tried again; the other one stays where it was.
    resumed = command("spd_launch.resume", "latest", "0").stdout
    assert "1 target(s) and 1 run(s)" in resumed
    again = ledger.latest_jobs(folder)
    assert again[target.run_id] in waits_for(slurm, again[one.run_id])
    assert "cancelled 2 live run(s)" in command("spd_launch.cancel", "latest").stdout
    assert {status(folder, run).state for run in (one, two)} == {"cancelled"}
    assert not slurm.run(*shown)


def test_a_requeued_target_job_goes_on_and_its_run_waits(
    launch: Launch, command: Command, slurm: Cluster
) -> None:
    folder, [run, target] = launch(*LM)
    jobs = ledger.latest_jobs(folder)
    wait_for(lambda: "step 200/100000" in log_of(folder, target), 300, "pretraining to report")
    slurm.run("scontrol", "requeue", jobs[target.run_id])
    wait_for(lambda: "the target stops at step" in log_of(folder, target), 180, "the save")
    stopped_at = re.findall(r"the target stops at step (\d+)", log_of(folder, target))[0]
    wait_for(lambda: "continuing the target" in log_of(folder, target), 300, "the second attempt")
    assert f"continuing the target from step {stopped_at}" in log_of(folder, target)
    assert status(folder, target).attempt == 2 and status(folder, run).attempt == 0
    assert jobs[target.run_id] in waits_for(slurm, jobs[run.run_id])
    shown = slurm.run("scontrol", "show", "job", jobs[target.run_id])
    assert "NumTasks=2" in shown
    assert "cancelled 2 live run(s)" in command("spd_launch.cancel", "latest").stdout
    assert status(folder, target).state == "cancelled"
    assert log(folder).count("Traceback") == 0
