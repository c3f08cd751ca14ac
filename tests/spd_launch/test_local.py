"""Runs on this machine, as a user sees them: real processes, real kills, one folder of results."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_configs import SMALL

from spd_core.run_dir import RunDir, read_metrics
from spd_launch.ledger import find_launch, read_rows
from spd_launch.run_record import Status, read_status

ROOT = Path(__file__).parent.parent.parent
RUN = ["+experiment=tms_5-2", "cluster=local", *SMALL]
LONG = ["train.steps=1000000", "checkpoint.every_steps=20", "eval.every=1000000",
        "eval.slow_every=1000000"]  # fmt: skip
NO_FIGURES = [
    f"eval.metrics.{name}=null"
    for name in ("ci_histograms", "component_activation_density", "uv_plots",
                 "ci_mean_per_component", "permuted_ci_plots")
]  # fmt: skip
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results in a path with a space; shared, so that the target is trained once."""
    return tmp_path_factory.mktemp("results") / "my out"


@pytest.fixture
def start(out: Path) -> Start:
    def run(module: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, "SPD_OUT_DIR": str(out), "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


def ended(process: subprocess.Popen[str], code: int) -> str:
    text, _ = process.communicate(timeout=120)
    assert process.returncode == code, text
    return text


def newest_run(out: Path) -> RunDir:
    return RunDir(max(out.glob("runs/*"), key=lambda path: path.stat().st_ctime_ns))


def current(out: Path) -> Status:
    status = read_status(newest_run(out))
    assert status is not None
    return status


def wait_for_checkpoint(out: Path, n_runs_before: int) -> RunDir:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if len(list(out.glob("runs/*"))) > n_runs_before:
            run_dir = newest_run(out)
            if list(run_dir.checkpoints.glob("step_*")):
                return run_dir
        time.sleep(0.1)
    raise TimeoutError("no checkpoint within 90 s")


def ranks_of(run_dir: RunDir) -> list[int]:
    """Processes of this run that still are (a zombie has no command line)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if run_dir.path.name.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.slow
def test_two_processes_finish_and_say_where_the_report_is(start: Start, out: Path) -> None:
    text = ended(start("spd_launch", *RUN, "dp=2"), 0)
    run_dir = newest_run(out)
    assert current(out).state == "finished" and current(out).step == 4
    assert str(run_dir.report_file) in text and run_dir.report_file.exists()
    assert {r["step"] for r in read_metrics(run_dir)} >= {1, 2, 4}
    shown = ended(start("spd_launch.status", "latest"), 0)
    assert "finished" in shown and "seed 0" in shown and "target  tms of seed 0" in text
    assert "nothing to resume" in ended(start("spd_launch.resume", "latest"), 0)


@pytest.mark.slow
def test_a_target_alone(start: Start, tmp_path: Path) -> None:
    out = f"launch.out_dir='{tmp_path}'"
    only = ["spd_launch", *RUN, out, "launch.goal=target"]
    text = ended(start(*only), 0)
    assert "1 target(s) here" in text and "the target is in" in text
    assert len(list(tmp_path.glob("targets/*/target.json"))) == 1
    status = current(tmp_path)
    assert (status.state, status.step, status.steps) == ("finished", 1000, 1000)
    assert "nothing to do" in ended(start(*only), 0)
    bad = ended(start(*only, "target.steps=1", "target.n_seeds=1"), 2)
    assert "error: no target of seeds 0 to 0 is good" in bad and "Traceback" not in bad
    shown = ended(start("spd_launch.status", "latest", f"--out-dir={tmp_path}"), 0)
    assert "failed: ValueError: no target of seeds 0 to 0 is good" in shown


OWN = """
def loss(model, batch, *, seed: int):
    if seed == 1:
        raise ArithmeticError("not this one")
    return batch.target_out.sum() * 0, 1
"""


@pytest.mark.slow
def test_packed_runs_fail_apart_and_have_logs(
    start: Start, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_loss.py").write_text(OWN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    own = "losses.own={path: own_loss.loss, coeff: 1.0, seed: '${seed}'}"
    packed = ["-m", *RUN, *NO_FIGURES, own, "seed=0,1,2", "launch.pack=2"]
    text = ended(start("spd_launch", *packed, "launch.then=[evaluate]"), 1)
    launch = find_launch("latest", out)
    rows = {row.name: row for row in read_rows(launch)}
    states = [read_status(launch.folder(row)) for row in rows.values()]
    assert [s.state if s else None for s in states] == [
        "finished", "failed", "finished", "finished", None, "finished",
    ]  # fmt: skip
    assert "evaluate-" in text and "not started" in text
    names = list(rows)
    assert f"{names[1]} failed: ArithmeticError: not this one" in text
    assert f"{names[0]} finished" in text and f"{names[2]} finished" in text
    shown = ended(start("spd_launch.logs", "latest", "1"), 0)
    assert "ArithmeticError: not this one" in shown
    other = ended(start("spd_launch.logs", "latest", "0"), 0)
    assert "ArithmeticError" not in other and "step 4/4" in other

    ended(start("spd_launch.resume", "latest", "1"), 1)  # alone, it has a log all the same
    newest = ended(start("spd_launch.logs", "latest", "1"), 0)
    assert "ArithmeticError: not this one" in newest.partition("==>")[2]


@pytest.mark.slow
def test_packed_runs_are_at_work_at_once_and_stop_together(start: Start, out: Path) -> None:
    before = len(list(out.glob("runs/*")))
    launcher = start("spd_launch", "-m", *RUN, *LONG, "seed=0,1,2", "launch.pack=2")
    wait_for_checkpoint(out, before)
    launch = find_launch("latest", out)
    runs = [launch.run_dir(row.name) for row in read_rows(launch)]
    deadline = time.monotonic() + 60
    while not all(list(r.checkpoints.glob("step_*")) for r in runs[:2]):
        assert time.monotonic() < deadline, "the second run has no checkpoint"
        time.sleep(0.1)
    launcher.send_signal(signal.SIGINT)
    ended(launcher, 130)
    states = [read_status(run) for run in runs]
    assert [s.state for s in states if s] == ["stopped", "stopped", "pending"]
    assert not any(ranks_of(run) for run in runs)


@pytest.mark.slow
def test_an_interrupted_run_saves_and_can_be_cancelled_for_good(start: Start, out: Path) -> None:
    before = len(list(out.glob("runs/*")))
    launcher = start("spd_launch", *RUN, *LONG)
    run_dir = wait_for_checkpoint(out, before)
    launcher.send_signal(signal.SIGINT)
    assert "spd_launch.resume" in ended(launcher, 130)
    stopped = current(out)
    assert stopped.state == "stopped" and (run_dir.checkpoints / f"step_{stopped.step}").is_dir()

    again = start("spd_launch.resume", "latest")
    deadline = time.monotonic() + 60
    while current(out).attempt == 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    ended(start("spd_launch.cancel", "latest"), 0)
    again.communicate(timeout=60)
    assert current(out).state == "cancelled" and current(out).attempt == 2
    assert current(out).step >= stopped.step


@pytest.mark.slow
def test_a_killed_launcher_takes_its_ranks_along_and_one_worker_holds_a_run(
    start: Start, out: Path
) -> None:
    before = len(list(out.glob("runs/*")))
    launcher = start("spd_launch", *RUN, *LONG)
    run_dir = wait_for_checkpoint(out, before)
    assert len(ranks_of(run_dir)) == 1
    second = start("spd_launch.task", str(find_launch("latest", out).path), run_dir.path.name)
    assert re.search("worked on by another process", ended(second, 2))
    assert current(out).state == "running"  # the refusal harmed nothing
    launcher.kill()
    deadline = time.monotonic() + 30
    while ranks_of(run_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ranks_of(run_dir) == []
    step = max(int(p.name.split("_")[1]) for p in run_dir.checkpoints.glob("step_*"))
    meta = json.loads((run_dir.checkpoints / f"step_{step}" / "meta.json").read_text())
    assert meta["step"] == step
    launcher.communicate(timeout=30)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_another_number_of_processes(start: Start, out: Path) -> None:
    steps = ["train.steps=250", "eval.every=250", "eval.slow_every=250", "track.log_every=1",
             "checkpoint.every_steps=20", "dp=2"]  # fmt: skip
    steps += NO_FIGURES
    ended(start("spd_launch", *RUN, *steps), 0)
    whole = newest_run(out)
    before = len(list(out.glob("runs/*")))
    launcher = start("spd_launch", *RUN, *steps)
    run_dir = wait_for_checkpoint(out, before)
    os.kill(ranks_of(run_dir)[0], signal.SIGKILL)
    assert "spd_launch.resume" in ended(launcher, 137)
    assert current(out).state == "failed"
    shown = ended(start("spd_launch.status", "latest"), 0)
    assert "killed" in shown

    config = run_dir.config_file.read_text()
    refused = ended(start("spd_launch.resume", "latest", "dp=3"), 2)
    assert "train.batch_size=64 does not divide by dp=3" in refused
    assert "TASK at most, and dp=N" in ended(start("spd_launch.resume", "latest", "seed=3"), 2)
    assert run_dir.config_file.read_text() == config and current(out).state == "failed"

    ended(start("spd_launch.resume", "latest", "0", "dp=1"), 0)
    assert current(out).state == "finished" and current(out).attempt == 2
    for got, wanted in zip(read_metrics(run_dir), read_metrics(whole), strict=True):
        timed = {k for k in wanted if k in ("time", "examples_per_s") or "cost" in k}
        for key in wanted.keys() - timed:
            assert got[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-5), key
