"""Names and paths that would do harm in a shell go through sbatch, submitit's script and srun."""

from pathlib import Path

from cluster import SMALL, Cluster, Command, log, wait_for, wait_until

from spd_launch import ledger

HOSTILE = "a b;touch PWNED $(touch PWNED) `touch PWNED` 'q' \"d\" #&*|>PWNED"


def hydra(text: str) -> str:
    """A value in Hydra's quotes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def test_they_do_no_harm(command: Command, slurm: Cluster, project: Path, tmp_path: Path) -> None:
    out = tmp_path / HOSTILE
    command(
        "spd_launch", *SMALL, f"launch.out_dir={hydra(str(out))}", f"launch.name={hydra(HOSTILE)}",
        f"cluster.env.HOSTILE={hydra(HOSTILE)}", f"+cluster.sbatch.mail-user={hydra(HOSTILE)}",
        "cluster=cpu", "launch.then=[]", "eval.slow_every=100",
    )  # fmt: skip
    folder = ledger.find_launch("latest", out)
    for task in reversed(ledger.read_tasks(folder)):
        wait_until(folder, task, "finished")
    [job] = {ledger.latest_jobs(folder)[task.run_id] for task in ledger.read_tasks(folder)[:1]}
    # The report is written when the run is finished, by the same job.
    wait_for(lambda: slurm.state(job) == "COMPLETED", 240, "the job to end")
    assert "report.html" in log(folder)
    assert str(out) in slurm.run("scontrol", "show", "job", job)
    shown = command("spd_launch.logs", folder.launch_id, "0", "--out-dir", str(out)).stdout
    assert "report.html" in shown
    found = [p for top in (tmp_path, project, Path.cwd()) for p in top.rglob("PWNED")]
    assert found == []
