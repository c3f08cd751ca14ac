"""Steps that follow the runs, on a real Slurm: who waits for whom, and what a failure leaves."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from cluster import Cluster, Command, Launch, status, until, wait_for, wait_until

from spd_launch import ledger
from spd_launch.ledger import LaunchDir
from spd_launch.run_record import read_status
from spd_launch.steps import STEPS

BOTH = "launch.then=[evaluate,report]"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results") / "meine Läufe"


pytestmark = pytest.mark.usefixtures("target")


def states(folder: LaunchDir) -> dict[str, str]:
    """Of the steps, by name: what their own files say."""
    rows = [row for row in ledger.read_rows(folder) if row.goal in STEPS]
    found = {row.name: read_status(folder.folder(row)) for row in rows}
    return {name: status.state if status else "pending" for name, status in found.items()}


def dependency(slurm: Cluster, job: str) -> str:
    return slurm.run("squeue", "-h", "-r", "-j", job, "-o", "%E").splitlines()[0]


def slurm_times(slurm: Cluster, job: str) -> tuple[str, str]:
    """Start and end of a job's last attempt, as Slurm saw them; ISO dates compare as text."""
    shown = slurm.run("scontrol", "show", "job", "--oneliner", job)
    start, end = (shown.split(f" {key}=")[1].split()[0] for key in ("StartTime", "EndTime"))
    return start, end


def queue_is_empty(slurm: Cluster, folder: LaunchDir) -> bool:
    return not slurm.run("squeue", "-h", "--name", folder.launch_id)


def table_row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if name in line)


def test_each_run_is_evaluated_when_it_ends_and_the_report_comes_last(
    launch: Launch, command: Command, slurm: Cluster, go: Path
) -> None:
    folder, [short, long] = launch("-m", "seed=0,1", BOTH, until(go, "wait"))
    jobs = ledger.latest_jobs(folder)
    array = jobs[short.run_id].split("_")[0]
    first, second = f"evaluate-{short.run_id}", f"evaluate-{long.run_id}"
    assert jobs[long.run_id] == f"{array}_1"
    assert jobs[first].split("_")[0] == jobs[second].split("_")[0]
    assert dependency(slurm, jobs[second]).startswith(f"aftercorr:{array}")
    wait_for(lambda: states(folder)[first] == "finished", 400, "the first evaluation")
    assert states(folder) == {first: "finished", second: "pending", "report": "pending"}
    shown = command("spd_launch.status", "latest").stdout
    assert "pending" in table_row(shown, "report")
    go.touch()
    followed = command("spd_launch.logs", "latest", "1", "-f").stdout  # until the run has ended
    assert status(folder, long).state == "finished" and f"runs/{long.run_id}" in followed
    wait_for(lambda: set(states(folder).values()) == {"finished"}, 400, f"all of {states(folder)}")
    wait_for(lambda: queue_is_empty(slurm, folder), 240, "the last job to end")
    assert "spd_analysis.report" in command("spd_launch.logs", "latest", "report").stdout
    assert "nothing to resume: 5 finished" in command("spd_launch.resume", "latest").stdout


def test_nothing_waits_for_a_run_that_failed_and_resume_sends_all_of_it_again(
    launch: Launch, command: Command, slurm: Cluster, go: Path
) -> None:
    folder, [good, bad] = launch("-m", "seed=0,1", BOTH, until(go, "fail"))
    wait_until(folder, bad, "failed")
    wait_for(lambda: queue_is_empty(slurm, folder), 400, "Slurm to give the others up")
    assert states(folder) == {
        f"evaluate-{good.run_id}": "finished",
        f"evaluate-{bad.run_id}": "pending",
        "report": "pending",
    }
    shown = command("spd_launch.status", "latest").stdout
    assert "no run" in table_row(shown, "report")
    assert re.search(rf"{bad.run_id}: failed: ArithmeticError: not yet", shown)

    go.touch()
    assert "1 run(s) and 2 step(s)" in command("spd_launch.resume", "latest").stdout
    wait_until(folder, bad, "finished")
    wait_for(lambda: set(states(folder).values()) == {"finished"}, 400, f"all of {states(folder)}")


def test_a_step_that_needs_any_run_goes_ahead(launch: Launch, go: Path) -> None:
    any_ = ["launch.then=[report]", "launch.then_needs=any"]
    folder, [_, bad] = launch("-m", "seed=0,1", *any_, until(go, "fail"))
    wait_until(folder, bad, "failed")
    wait_for(lambda: states(folder)["report"] == "finished", 400, "the report to go ahead")


def test_steps_are_cancelled_with_their_runs(
    launch: Launch, command: Command, slurm: Cluster
) -> None:
    folder, [one, two] = launch("-m", "seed=0,1", BOTH, "+cluster.sbatch.hold=true")
    assert "cancelled 2 live" in command("spd_launch.cancel", "latest", "0").stdout
    assert (status(folder, one).state, status(folder, two).state) == ("cancelled", "pending")
    assert states(folder)[f"evaluate-{one.run_id}"] == "cancelled"
    command("spd_launch.cancel", "latest")
    assert queue_is_empty(slurm, folder)
    assert set(states(folder).values()) == {"cancelled"}


@pytest.mark.parametrize("steps", ["report", "evaluate,report"])
def test_what_follows_a_requeued_run_starts_when_that_has_really_ended(
    steps: str, launch: Launch, slurm: Cluster, go: Path
) -> None:
    arguments = ["-m", "seed=0,1", f"launch.then=[{steps}]", until(go, "wait")]
    folder, [_, run] = launch(*arguments)
    jobs = ledger.latest_jobs(folder)
    wait_until(folder, run, "running")
    slurm.run("scontrol", "requeue", jobs[run.run_id])
    wait_for(lambda: status(folder, run).attempt == 2, 400, "the second attempt")
    # Who waits for the run itself still does; the report waits for what comes last in each chain.
    chain = [run.run_id, f"evaluate-{run.run_id}", "report"]
    chain = [name for name in chain if name in jobs]
    for first, then in pairwise(chain):
        assert f":{jobs[first].split('_')[0]}" in dependency(slurm, jobs[then]), (first, then)
    go.touch()
    wait_until(folder, run, "finished")
    wait_for(lambda: set(states(folder).values()) == {"finished"}, 400, f"all of {states(folder)}")
    times = [slurm_times(slurm, jobs[name]) for name in chain]
    for (_, ended), (started, _) in pairwise(times):
        assert ended <= started
