"""What `logs` shows, from files alone; following is seen in tests/cluster."""

from pathlib import Path

import pytest
from launches import launched

from spd_core.run_dir import write_atomic
from spd_launch import ledger, logs
from spd_launch.errors import LaunchError
from spd_launch.ledger import LaunchDir
from spd_launch.run_record import ERROR


@pytest.fixture
def launch(tmp_path: Path) -> LaunchDir:
    """Two runs with logs of two ranks, the second failed; their target's job left none."""
    launch = launched(tmp_path, "running", "failed", cluster="cpu", launch__then=["report"])
    one, two, target, report = ledger.read_rows(launch)
    jobs = {one.name: "7_0", two.name: "7_1", target.name: "6", report.name: "8"}
    ledger.note_jobs(launch, "submit", jobs)
    for job in ("7_0", "7_1"):
        for rank in (0, 1):
            (launch.logs / f"{job}_{rank}_log.out").write_text(f"job {job}, rank {rank}\n")
    write_atomic(launch.folder(two).path / ERROR, "ArithmeticError: too much\n")
    return launch


def show(
    launch: LaunchDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words
) -> list[str]:
    out_dir = f"--out-dir={launch.path.parent.parent}"
    monkeypatch.setattr("sys.argv", ["logs", "latest", *words, out_dir])
    assert logs.main() == 0
    return capsys.readouterr().out.splitlines()


def test_any_rank_and_the_error_comes_first(launch, capsys, monkeypatch) -> None:
    _, two, *_ = ledger.read_rows(launch)
    file = launch.logs / "7_0_0_log.out"
    assert show(launch, capsys, monkeypatch, "0") == [f"==> {file} <==", "job 7_0, rank 0"]
    assert show(launch, capsys, monkeypatch, "0", "--rank=1")[1] == "job 7_0, rank 1"
    first, _, last = show(launch, capsys, monkeypatch, two.name)
    assert first == f"{two.name} failed: ArithmeticError: too much"
    assert last == "job 7_1, rank 0"


def test_runs_that_share_a_job_have_a_log_each(tmp_path, capsys, monkeypatch) -> None:
    launch = launched(tmp_path, "running", "running", "running", cluster="cpu")
    runs = [row.name for row in ledger.read_rows(launch)[:3]]
    ledger.note_jobs(launch, "submit", {runs[0]: "7_0", runs[1]: "7_0", runs[2]: "7_1"})
    for name in ("7_0_0", "7_0_1", "7_1_0"):
        (launch.logs / f"{name}_log.out").write_text(f"{name}\n")
    shown = [show(launch, capsys, monkeypatch, str(index))[1] for index in range(3)]
    assert shown == ["7_0_0", "7_0_1", "7_1_0"]
    ledger.note_jobs(launch, "submit", {runs[1]: "8"})  # resumed by itself
    ledger.note_jobs(launch, "cancel", {runs[0]: "7_0"})
    assert ledger.latest_places(launch) == {runs[0]: 0, runs[1]: 0, runs[2]: 0}


def test_of_a_whole_launch_where_each_log_is(launch, capsys, monkeypatch) -> None:
    lines = show(launch, capsys, monkeypatch)
    cells = [line.split() for line in lines[1:5]]
    states = [(row[1], row[2]) for row in cells]
    rows = ledger.read_rows(launch)
    assert states == [
        (row.name, state)
        for row, state in zip(rows, ["running", "failed", "pending", "pending"], strict=True)
    ]
    assert cells[1][3] == str(launch.logs / "7_1_0_log.out")


def test_what_has_not_started_says_so(launch, capsys, monkeypatch) -> None:
    assert "not there yet" in show(launch, capsys, monkeypatch, "report")[-1]
    assert "no such rank" in show(launch, capsys, monkeypatch, "0", "--rank=9")[-1]


def test_a_launch_in_a_terminal_has_no_logs_but_says_what_failed(
    tmp_path, capsys, monkeypatch
) -> None:
    launch = launched(tmp_path, "finished", "failed")
    _, two = ledger.read_rows(launch)
    write_atomic(launch.folder(two).path / ERROR, "ValueError: no\n")
    with pytest.raises(LaunchError, match="ran in a terminal"):
        show(launch, capsys, monkeypatch)
    assert f"{two.name} failed: ValueError: no" in capsys.readouterr().out
