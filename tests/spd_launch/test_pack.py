"""Who of the runs that share a job does what; cluster/test_pack_on_slurm.py has real jobs."""

from pathlib import Path

from launches import launched, set_state

from spd_launch import ledger
from spd_launch.pack import not_for_this_job, speaks_for_all
from spd_launch.task import Place


def place(*beside: str, restart: int = 0) -> Place:
    return Place(0, 1, 0, nodes=1, job_id="7_0", restart=restart, beside=beside)


def test_the_first_that_saved_requeues_once_none_is_at_work(tmp_path: Path) -> None:
    launch = launched(tmp_path, "finished", "stopped", "stopped", cluster="cpu")
    a, b, c = (row.name for row in ledger.read_rows(launch)[:3])
    assert speaks_for_all(launch.run_dir(b), place(a, c), 5)
    assert not speaks_for_all(launch.run_dir(c), place(a, b), 5)
    set_state(launch, b, "running")  # it does not save in time
    assert speaks_for_all(launch.run_dir(c), place(a, b), 1)


def test_who_stopped_in_another_job_does_not_requeue_this_one(tmp_path: Path) -> None:
    launch = launched(tmp_path, "stopped", "stopped", cluster="cpu")
    a, b = (row.name for row in ledger.read_rows(launch)[:2])
    set_state(launch, a, "stopped", job_id="7_0")
    assert not speaks_for_all(launch.run_dir(b), place(a), 5)
    set_state(launch, a, "stopped", job_id="8")  # it had failed, and was resumed alone
    assert speaks_for_all(launch.run_dir(b), place(a), 5)


def test_what_failed_or_was_resumed_elsewhere_takes_no_part(tmp_path: Path) -> None:
    launch = launched(tmp_path, "failed", "cancelled", "stopped", cluster="cpu")
    a, b, c = (row.name for row in ledger.read_rows(launch)[:3])
    ledger.note_jobs(launch, "submit", dict.fromkeys((a, b, c), "7_0"))
    told = [not_for_this_job(launch, name, place("x", restart=1)) for name in (a, b, c)]
    assert told == [
        f"{a} is failed: only `resume` continues it",
        f"{b} is cancelled: only `resume` continues it",
        None,
    ]
    ledger.note_jobs(launch, "submit", {c: "8"})
    for restart in (0, 1):  # 0: it was cancelled and resumed while this job waited
        told = not_for_this_job(launch, c, place("x", restart=restart))
        assert told == f"{c} was resumed in another job"
