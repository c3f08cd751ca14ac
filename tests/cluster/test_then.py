"""Steps that follow the runs, on a real Slurm: who waits for whom, and what a failure leaves."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import SMALL, Cluster, Command, Launch, status, wait_for, wait_until

from spd_launch import ledger
from spd_launch.ledger import LaunchDir
from spd_launch.run_record import read_status
from spd_launch.steps import STEPS

BOTH = "launch.then=[evaluate,report]"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results") / "meine Läufe"


@pytest.fixture(scope="module", autouse=True)
def _target(command: Command) -> None:
    command("spd_launch", *SMALL, "cluster=local", "launch.goal=target")


@pytest.fixture(autouse=True)
def _nothing_is_left(slurm: Cluster) -> Iterator[None]:
    yield
    slurm.run("scancel", "--user=root")


def states(folder: LaunchDir) -> dict[str, str]:
    """Of the steps, by name: what their own files say."""
    rows = [row for row in ledger.read_rows(folder) if row.goal in STEPS]
    found = {row.name: read_status(folder.folder(row)) for row in rows}
    return {name: status.state if status else "pending" for name, status in found.items()}


def dependency(slurm: Cluster, job: str) -> str:
    return slurm.run("squeue", "-h", "-r", "-j", job, "-o", "%E").splitlines()[0]


def queue_is_empty(slurm: Cluster, folder: LaunchDir) -> bool:
    return not slurm.run("squeue", "-h", "--name", folder.launch_id)


def table_row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if name in line)


LOSS = """
import time
from pathlib import Path

from spd_core.component_model import ComponentModel
from spd_core.data.batches import Batch
from spd_core.losses.distance import LossParts


def loss(model: ComponentModel, batch: Batch, *, seed: int, without: str, then: str) -> LossParts:
    while seed == 1 and not Path(without).exists():
        if then == "fail":
            raise ArithmeticError("not yet")
        time.sleep(0.1)
    return batch.target_out.sum() * 0, 1
"""


@pytest.fixture
def go(project: Path, tmp_path: Path) -> Path:
    """The file that a run of seed 1 waits for, or fails without: see `until`."""
    (project / "stubborn.py").write_text(LOSS)
    return tmp_path / "go"


def until(go: Path, then: str) -> str:
    own = f"path: stubborn.loss, coeff: 1.0, seed: '${{seed}}', without: '{go}', then: {then}"
    return f"losses.stubborn={{{own}}}"


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
    wait_for(lambda: states(folder)[first] == "finished", 120, "the first evaluation")
    assert states(folder) == {first: "finished", second: "pending", "report": "pending"}
    shown = command("spd_launch.status", "latest").stdout
    assert "pending" in table_row(shown, "report")
    go.touch()
    wait_until(folder, long, "finished")
    wait_for(lambda: set(states(folder).values()) == {"finished"}, 120, f"all of {states(folder)}")
    wait_for(lambda: queue_is_empty(slurm, folder), 60, "the last job to end")
    assert "spd_analysis.report" in command("spd_launch.logs", "latest", "report").stdout
    assert "nothing to resume: 5 finished" in command("spd_launch.resume", "latest").stdout


def test_nothing_waits_for_a_run_that_failed_and_resume_sends_all_of_it_again(
    launch: Launch, command: Command, slurm: Cluster, go: Path
) -> None:
    folder, [good, bad] = launch("-m", "seed=0,1", BOTH, until(go, "fail"))
    wait_until(folder, bad, "failed")
    wait_for(lambda: queue_is_empty(slurm, folder), 120, "Slurm to give the others up")
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
    wait_for(lambda: set(states(folder).values()) == {"finished"}, 120, f"all of {states(folder)}")


def test_a_step_that_needs_any_run_goes_ahead(launch: Launch, go: Path) -> None:
    any_ = ["launch.then=[report]", "launch.then_needs=any"]
    folder, [_, bad] = launch("-m", "seed=0,1", *any_, until(go, "fail"))
    wait_until(folder, bad, "failed")
    wait_for(lambda: states(folder)["report"] == "finished", 240, "the report to go ahead")


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


def test_a_requeued_run_is_still_waited_for(launch: Launch, slurm: Cluster, go: Path) -> None:
    folder, [run] = launch("seed=1", BOTH, until(go, "wait"))
    jobs = ledger.latest_jobs(folder)
    wait_until(folder, run, "running")
    slurm.run("scontrol", "requeue", jobs[run.run_id])
    wait_for(lambda: status(folder, run).attempt == 2, 120, "the second attempt")
    assert set(states(folder).values()) == {"pending"}  # neither the evaluation nor the report
    go.touch()
    wait_until(folder, run, "finished")
    wait_for(lambda: set(states(folder).values()) == {"finished"}, 120, f"all of {states(folder)}")
