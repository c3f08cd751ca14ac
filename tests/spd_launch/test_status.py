"""What the commands say of a launch, from its files alone; with a real Slurm in tests/cluster."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launches import add_metrics, launched, set_state

from benchmarks.status import make_launch
from spd_core.run_dir import write_atomic
from spd_launch import ledger
from spd_launch.observe import judge, strangers
from spd_launch.pace import pace_of
from spd_launch.run_record import ERROR, WANDB_URL, read_status
from spd_launch.slurm_state import LiveJob
from spd_launch.status import as_data, look, main, print_launch
from spd_launch.steps import STEPS

ROOT = Path(__file__).parent.parent.parent
THEN = {"launch__then": ["evaluate", "report"]}


def states(launch, live=None, rows=None) -> dict[str, str]:
    return {o.row.name: o.state for o in judge(launch, rows or ledger.read_rows(launch), live)}


def test_rate_and_remaining_time_leave_out_what_is_rare(tmp_path: Path) -> None:
    launch = launched(tmp_path, "running")
    [row] = ledger.read_rows(launch)
    folder = launch.folder(row)
    # Ten steps in five seconds, but for a pause of an hour between two attempts.
    moments = [(10, 0.0), (20, 5.0), (30, 3605.0), (40, 3610.0), (50, 3615.0)]
    text = "".join(
        json.dumps({"step": s, "loss/total": 1 / s, "loss/x_recon": 2.0, "time": t}) + "\n"
        for s, t in moments
    )
    folder.metrics_file.write_text(text + '{"step": 60, "loss/to')
    status = read_status(folder)
    assert status is not None
    pace = pace_of(folder, status.model_copy(update={"steps": 100}))
    assert pace.steps_per_s == 2.0 and pace.left_s == 25.0
    assert pace.losses["total"] == 0.02 and pace.recon == 2.0
    folder.metrics_file.unlink()
    assert pace_of(folder, status).steps_per_s is None


def test_a_launch_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch = launched(tmp_path, "finished", "failed", **THEN)
    one, two, *_ = ledger.read_rows(launch)
    add_metrics(launch, one.name, step=2, loss__total=0.5)
    write_atomic(launch.folder(two).path / ERROR, "ValueError: no\n")
    write_atomic(launch.folder(one).path / WANDB_URL, "https://w/1\n")
    print_launch(launch, look(launch, None))
    text = capsys.readouterr().out
    header, first = text.splitlines()[1:3]
    assert header.split() == ["#", "run", "state", "step", "loss", "seen", "attempt", "evaluate",
                              "W&B"]  # fmt: skip
    assert first.split()[:5] == ["0", one.name, "finished", "2/4", "5.00e-01"]
    assert first.endswith("https://w/1") and "not sent" in first
    assert f"{two.name}: failed: ValueError: no" in text
    assert "1 finished, 1 failed" in text and f"resume {launch.launch_id}" in text
    assert not capsys.readouterr().out.count("\033")

    data = as_data(launch, look(launch, None))
    assert [row["state"] for row in data["rows"]] == ["finished", "failed", *["not sent"] * 3]
    assert data["rows"][1]["error"] == "ValueError: no" and data["then"] == THEN["launch__then"]
    assert data["rows"][0]["varies"] == {"seed": 0} and data["slurm"] == "asked"


def test_one_run_by_its_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch = launched(tmp_path, "finished", "failed", **THEN)
    _, two, *_ = ledger.read_rows(launch)
    print_launch(launch, look(launch, two.name))
    assert "1 run(s): 1 failed" in capsys.readouterr().out


def test_what_a_lost_job_was(tmp_path: Path) -> None:
    launch = launched(tmp_path, "pending", "pending", "stopped", "failed", cluster="cpu", **THEN)
    rows = ledger.read_rows(launch)
    runs = [row for row in rows if row.goal == "decomposition"]
    [target] = [row for row in rows if row.goal == "target"]
    steps = [row for row in rows if row.goal in STEPS]
    jobs = {row.name: f"7_{i}" for i, row in enumerate([*runs, *steps])} | {target.name: "6"}
    del jobs[runs[1].name]  # the launch was killed before it
    ledger.note_jobs(launch, "submit", jobs)
    set_state(launch, target.name, "failed")
    found = states(launch, live={})
    assert [found[row.name] for row in runs] == ["no target", "not sent", "stopped", "failed"]
    assert {found[row.name] for row in steps} == {"no run"}
    # Slurm's word for what lives; what it does not know of has no state but that of its file.
    live = {"7_0": LiveJob("RUNNING", "node1"), "9": LiveJob("PENDING", "(Priority)")}
    assert states(launch, live)[runs[0].name] == "running"
    assert strangers(launch, live) == ["9"]
    assert states(launch, live=None)[runs[0].name] == "pending"


def test_runs_that_share_a_job_have_states_of_their_own(tmp_path: Path) -> None:
    launch = launched(
        tmp_path, "finished", "failed", "cancelled", "running", "stopped", cluster="cpu"
    )
    runs = [row.name for row in ledger.read_rows(launch) if row.goal == "decomposition"]
    ledger.note_jobs(launch, "submit", dict.fromkeys(runs, "7_0"))
    seen = judge(launch, ledger.read_rows(launch)[:5], {"7_0": LiveJob("RUNNING", "node1")})
    assert [(row.state, row.live) for row in seen] == [
        ("finished", False), ("failed", False), ("cancelled", False), ("running", True),
        ("running", True),
    ]  # fmt: skip


def test_of_jobs_sent_at_once_the_one_that_the_run_did_not_refuse_is_shown(tmp_path: Path) -> None:
    launch = launched(tmp_path / "slurm", "running", cluster="cpu")
    [row] = [row for row in ledger.read_rows(launch) if row.goal == "decomposition"]
    for job in ("7", "8"):
        ledger.note_jobs(launch, "submit", {row.name: job})
    [seen] = judge(launch, [row], {"7": LiveJob("RUNNING", "node1")})
    assert (seen.state, seen.live, seen.job_id) == ("running", True, "7")

    launch = launched(tmp_path / "local", "running")
    [row] = ledger.read_rows(launch)
    launchers = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)  # spd_launch"])
        for _ in range(2)
    ]
    try:
        for launcher in launchers:
            ledger.note_jobs(launch, "local", {row.name: f"local-{launcher.pid}"})
        jobs = []
        for launcher in reversed(launchers):
            jobs.append(judge(launch, [row], {})[0].job_id)
            launcher.kill()
            launcher.wait()
    finally:
        for launcher in launchers:
            launcher.kill()
    assert jobs == [f"local-{launcher.pid}" for launcher in reversed(launchers)]
    [seen] = judge(launch, [row], {})
    assert (seen.state, seen.live) == ("ended, not finished", False)


def test_a_command_with_the_number_of_a_process_that_is_gone_is_not_taken_for_it(
    tmp_path: Path,
) -> None:
    launch = launched(tmp_path, "running")
    [row] = ledger.read_rows(launch)
    note = (
        "import os, sys; from pathlib import Path; from spd_launch import ledger\n"
        f"launch = ledger.LaunchDir(Path({str(launch.path)!r}))\n"
        f"ledger.note_jobs(launch, 'local', {{{row.name!r}: f'local-{{os.getpid()}}'}})\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'spd_launch.status', *sys.argv[1:]])"
    )
    line = [sys.executable, "-c", note, "latest", "--json", f"--out-dir={tmp_path}"]
    told = json.loads(subprocess.check_output(line, cwd=ROOT, text=True))["rows"][0]
    assert (told["state"], told["live"]) == ("ended, not finished", False)


def test_a_slurm_that_does_not_answer_is_named_and_the_files_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(tmp_path / "o", "running", cluster="cpu")
    (tmp_path / "bin").mkdir()
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("sys.argv", ["status", "latest", f"--out-dir={tmp_path / 'o'}"])
    assert main() == 0
    text = capsys.readouterr().out
    assert "Slurm cannot be asked" in text and "Unable to contact slurm controller" in text
    assert "running" in text


def cpu_seconds(*command: str, out: Path) -> float:
    before = os.times()
    line = [sys.executable, "-m", *command]
    env = {**os.environ, "SPD_OUT_DIR": str(out)}
    subprocess.run(line, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("large")
    make_launch(out, 1000, 60)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["status latest", "status latest --json", "status", "results latest", "logs latest"]
)
def test_a_launch_of_a_thousand_runs_takes_seconds(command: str, large: Path) -> None:
    """One second of the processor; the limit is for busy machines."""
    module, *arguments = command.split()
    assert cpu_seconds(f"spd_launch.{module}", *arguments, out=large) < 10


@pytest.mark.parametrize("module", ["status", "logs", "cancel", "resume", "results", "prune"])
def test_help_takes_a_moment(module: str, tmp_path: Path) -> None:
    assert cpu_seconds(f"spd_launch.{module}", "--help", out=tmp_path) < 5


def test_the_list_of_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = launched(tmp_path, "finished", "pending")
    time.sleep(0.01)
    second = launched(tmp_path, "failed")
    monkeypatch.setattr("sys.argv", ["status", f"--out-dir={tmp_path}"])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == [first.launch_id, second.launch_id]
    assert lines[2].endswith("1 finished, 1 pending")
    monkeypatch.setattr("sys.argv", ["status", "--json", f"--out-dir={tmp_path}"])
    assert main() == 0
    assert json.loads(capsys.readouterr().out)[1] == {
        "launch": second.launch_id, "runs": 1, "states": {"failed": 1},
    }  # fmt: skip
