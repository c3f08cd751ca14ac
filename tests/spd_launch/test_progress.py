import io

from rich.console import Console

from spd_launch.progress import Heartbeat, StepBar
from spd_launch.run_record import read_status


def test_the_first_step_is_written_at_once_and_the_last_with_the_outcome(make_run_dir):
    run_dir = make_run_dir("run")
    heartbeat = Heartbeat(run_dir, 50, attempt=2, job_id="7")
    heartbeat.at(11)
    first = read_status(run_dir)
    assert (first.state, first.step, first.steps) == ("running", 11, 50)
    assert (first.attempt, first.job_id) == (2, "7")
    heartbeat.at(12)
    assert read_status(run_dir) == first  # a moment later: not worth a write
    heartbeat.write("failed")
    assert (read_status(run_dir).state, read_status(run_dir).step) == ("failed", 12)


def test_other_ranks_write_nothing(make_run_dir):
    run_dir = make_run_dir("run")
    heartbeat = Heartbeat(None, 50, attempt=1, job_id="7")
    heartbeat.at(1)
    heartbeat.write("finished")
    assert read_status(run_dir) is None


def test_a_log_file_gets_a_line_per_report_and_a_terminal_a_bar():
    for is_terminal, n_lines in ((False, 1), (True, None)):
        file = io.StringIO()
        shown = StepBar(10, Console(file=file, force_terminal=is_terminal, width=120))
        shown.at(1, {})
        shown.at(2, {"loss/total": 0.5, "loss/faithfulness": 0.25, "schedule/lr": 1.0})
        shown.at(3, {"eval/loss/total": 7.0})
        shown.bar.stop()
        text = file.getvalue()
        assert "5.00e-01" in text and "7.00" not in text and "1.00e+00" not in text
        if n_lines is not None:
            assert len(text.split("\n\n")[0].splitlines()) == n_lines and "faithfulness" in text
