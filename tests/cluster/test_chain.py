"""From one command to findings, on a real Slurm: training, evaluation, ensembles, comparison."""

import json
from pathlib import Path

import numpy as np
from cluster import Cluster, Command, Launch, wait_for

from spd_launch import ledger
from spd_launch.ledger import LaunchDir
from spd_launch.run_record import read_status

STEPS = "launch.then=[evaluate,clustering,cluster_distances,compare,report]"
ENSEMBLE = ("launch.clustering.n=2", "launch.clustering.options=['data.n_samples=256']")


def states(folder: LaunchDir) -> dict[str, str]:
    """Of all rows: what their own files say."""
    rows = ledger.read_rows(folder)
    found = {row.name: read_status(folder.folder(row)) for row in rows}
    return {name: status.state if status else "pending" for name, status in found.items()}


def wait_for_all(folder: LaunchDir) -> None:
    done = {"finished"}
    wait_for(lambda: set(states(folder).values()) == done, 900, f"all of {folder.launch_id}")


def kill_and_requeue(slurm: Cluster, job: str) -> None:
    wait_for(lambda: slurm.state(job) == "RUNNING", 600, f"{job} to start")
    slurm.run("scontrol", "requeue", job)


def test_three_seeds_to_a_report_although_tasks_are_killed_and_a_member_more(
    launch: Launch, command: Command, slurm: Cluster
) -> None:
    held = "+cluster.sbatch.hold=true"  # nothing starts before it is looked at
    folder, tasks = launch("-m", "seed=0,1,2", STEPS, *ENSEMBLE, held)
    runs = [task.run_id for task in tasks if task.goal == "decomposition"]
    jobs = ledger.latest_jobs(folder)
    array = jobs[runs[0]].split("_")[0]
    waits = slurm.run("squeue", "-h", "-r", "-j", jobs[f"evaluate-{runs[1]}"], "-o", "%E")
    assert len(runs) == 3 and waits.startswith(f"aftercorr:{array}")
    slurm.run("scontrol", "release", *jobs.values())
    killed = [runs[1], f"clustering-1-{runs[0]}"]
    for name in killed:
        kill_and_requeue(slurm, jobs[name])
    wait_for_all(folder)

    attempts = {
        name: int(slurm.run("scontrol", "show", "job", "--oneliner", jobs[name])
                  .split("Restarts=")[1].split()[0])
        for name in (*killed, runs[0])
    }  # fmt: skip
    assert attempts == {killed[0]: 1, killed[1]: 1, runs[0]: 0}
    for run in runs:
        run_dir = folder.run_dir(run).path
        [step] = json.loads((run_dir / "evals" / "full.json").read_text())["checkpoints"]
        assert step == "20"
        ensemble = run_dir / "clusterings" / "ensemble"
        assert sorted(f.name for f in ensemble.iterdir()) == ["distances", "seed_0", "seed_1"]
        arrays = np.load(ensemble / "distances" / "distances.npz")
        assert arrays["seeds"].tolist() == [0, 1] and arrays["hamming_best"].shape == (2, 2)
    summary = json.loads((folder.path / "analysis" / "compare" / "summary.json").read_text())
    assert summary["runs"] == runs and np.shape(summary["matched"]) == (3, 3)
    page = (folder.path / "report.html").read_text()
    for title in ("Evaluation full", "Similarity of the decompositions", "Ensemble ensemble"):
        assert f"<h2>{title}</h2>" in page
    wait_for(lambda: not slurm.run("squeue", "-h"), 180, "the last job to end")
    assert "nothing to resume: 18 finished" in command("spd_launch.resume", "latest").stdout
    add_a_member(folder.run_dir(runs[0]).path, command)


def add_a_member(run_dir: Path, command: Command) -> None:
    """To the ensemble of a finished run: only what is missing is computed."""
    members = run_dir / "clusterings" / "ensemble"
    before = (members / "seed_1" / "history.npz").stat().st_mtime_ns
    said = command(
        "spd_launch", "+pipeline=clustering", f"run={run_dir.name}", "n=3", "data.n_samples=256",
        "cluster=cpu", "cluster.time_min=5",
    ).stdout  # fmt: skip
    assert "run(s)" not in said and "4 step(s)" in said
    folder = ledger.find_launch("latest", run_dir.parent.parent)
    wait_for_all(folder)  # the distances fail where a member of the three is missing
    arrays = np.load(members / "distances" / "distances.npz")
    assert arrays["seeds"].tolist() == [0, 1, 2]
    assert (members / "seed_1" / "history.npz").stat().st_mtime_ns == before
