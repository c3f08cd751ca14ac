import multiprocessing

import pytest
from launch_configs import config

from spd_launch import ledger
from spd_launch.progress import Heartbeat
from spd_launch.run_record import n_time_limits, note_crash, note_time_limit


@pytest.fixture
def launch(tmp_path):
    _, launch = ledger.new_launch([({}, config("local", launch__out_dir=tmp_path))])
    return launch


def test_half_a_line_of_jobs_is_never_read_and_goes_with_the_next(launch):
    ledger.note_jobs(launch, "submit", {"a": "1", "b": "2"})
    with open(launch.jobs_file, "a") as file:
        file.write('{"kind": "submit", "jobs": {"a": "3')  # a kill, or a full disk
    assert ledger.latest_jobs(launch) == {"a": "1", "b": "2"}
    assert ledger.known_jobs(launch) == {"1", "2"}
    ledger.note_jobs(launch, "submit", {"b": "4"})
    assert ledger.latest_jobs(launch) == {"a": "1", "b": "4"}
    assert len(launch.jobs_file.read_text().splitlines()) == 2


def test_commands_that_note_at_once_lose_no_line(launch):
    def note(first):
        for job in range(first, first + 40):
            ledger.note_jobs(launch, "submit", {"a": str(job)})

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=note, args=(first,)) for first in (0, 100, 200)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert ledger.known_jobs(launch) == {str(f + i) for f in (0, 100, 200) for i in range(40)}


def test_a_crash_is_worth_another_turn_only_if_the_run_got_further(make_run_dir):
    run_dir = make_run_dir("run")
    told = []
    for job, step in (("7", 5), ("7", 5), ("8", 4), ("8", 6)):
        heartbeat = Heartbeat(run_dir, 50, attempt=1, job_id=job)
        heartbeat.at(step)
        told.append(note_crash(run_dir, job, ArithmeticError("boom")))
    assert told == [True, False, False, True]


def test_only_turns_asked_for_at_a_time_limit_are_counted_and_by_job(make_run_dir):
    run_dir = make_run_dir("run")
    for job in ("7", "8", "7"):
        note_time_limit(run_dir, job)
    heartbeat = Heartbeat(run_dir, 50, attempt=1, job_id="7")
    heartbeat.at(5)
    assert note_crash(run_dir, "7", ArithmeticError("boom"))
    assert [n_time_limits(run_dir, job) for job in ("7", "8", "9")] == [2, 1, 0]
