import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from spd_core import tracking
from spd_core.config import config_to_yaml
from spd_core.run_dir import Status, read_metrics, write_status
from spd_core.targets.train_target import target_folder
from spd_core.tracking import Tracker, write_environment

# A target of this seed is in no store: its files are made up.
OFFLINE = ("track.wandb.mode=offline", "train.steps=2", "target.seed=77")
ONLINE = ("track.wandb.mode=online", "train.steps=2", "target.seed=77")


def test_tracker_writes_one_line_per_report(make_config, make_run_dir):
    run_dir = make_run_dir("run")
    with Tracker(make_config(), run_dir, Console(quiet=True), 0) as tracker:
        tracker.log(0, {"loss/total": 0.5, "lr": 0.1})
        tracker.advance(1)
        tracker.log(1, {"eval/loss/x": 0.25})
    records = [{k: v for k, v in r.items() if k != "time"} for r in read_metrics(run_dir)]
    assert records == [{"step": 0, "loss/total": 0.5, "lr": 0.1}, {"step": 1, "eval/loss/x": 0.25}]


# ---------------------------------------------------------------- W&B, in a process of its own


@pytest.fixture
def run_folder(make_config, make_run_dir, tmp_path, monkeypatch):
    """The folder of a run with these overrides, as it is when its tracker starts."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)

    def make(overrides):
        config, run_dir = make_config(*overrides), make_run_dir("a_run")
        run_dir.config_file.write_text(config_to_yaml(config))
        run_dir.metrics_file.touch()
        set_state(run_dir, "running")
        return config, run_dir

    return make


def set_state(run_dir, state):
    fields = {"step": 2, "steps": 2, "heartbeat": 0.0, "attempt": 1, "job_id": None, "host": "h"}
    write_status(run_dir, Status(state=state, **fields))


@pytest.fixture
def track(run_folder, capfd):
    """Track two steps with these overrides, then `also`; gives the run folder and the output."""

    def run(overrides, also=lambda _tracker, _run_dir, _config: None):
        config, run_dir = run_folder(overrides)
        console = Console(file=io.StringIO(), record=True)
        with Tracker(config, run_dir, console, 0) as tracker:
            started = time.monotonic()
            for step in (1, 2):
                tracker.log(step, {"loss/total": 0.0123456 * step})
                tracker.advance(step)
            also(tracker, run_dir, config)
            assert time.monotonic() - started < 1  # W&B holds nothing up, whatever it does
        assert [r["step"] for r in read_metrics(run_dir)][:2] == [1, 2]
        wait_until_alone(run_dir)
        return run_dir, console.export_text() + capfd.readouterr().out

    return run


def processes_of(run_dir):
    """Processes with the run's folder in their command line (a zombie has none)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(run_dir.path).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_until_alone(run_dir):
    deadline = time.monotonic() + 30
    while processes_of(run_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(run_dir)


def finish(tracker, run_dir, config):
    """What the last evaluation and the last checkpoint leave, beside a target from elsewhere."""
    for step in (1, 2):
        (run_dir.figures / f"step_{step}").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(run_dir.figures / "step_2" / "uv.png")
    tracker.log(2, {"eval/mmcs/linear1": 0.75})
    checkpoint = run_dir.checkpoints / "step_2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.safetensors").write_bytes(b"weights")
    meta = {"step": 2, "sha256": sha256(b"weights").hexdigest()}
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    target = target_folder(config, run_dir.targets)
    target.mkdir(exist_ok=True)
    (target / "target.safetensors").write_bytes(b"target")
    set_state(run_dir, "finished")


def test_offline_keeps_values_figures_and_files_under_the_runs_id(track, make_config):
    run_dir, output = track(OFFLINE, also=finish)
    (folder,) = run_dir.path.glob("wandb/offline-run-*")
    kept = (folder / "run-a_run.wandb").read_bytes()
    assert b"loss/total" in kept and b"0.0123456" in kept and b"mmcs" in kept
    assert len(list(folder.glob("files/media/images/figures/uv_2_*.png"))) == 1
    digest = target_folder(make_config(*OFFLINE), run_dir.targets).name
    assert (folder / f"files/targets/{digest}/target.safetensors").read_bytes() == b"target"
    assert (folder / "files/runs/a_run/checkpoints/step_2/meta.json").exists()
    # W&B keeps a config.yaml of its own, and ours is not that.
    assert run_dir.config_file.read_text() == config_to_yaml(make_config(*OFFLINE))
    assert "failed" not in output and f"wandb sync {folder}" in output


def test_what_is_not_finished_has_no_files(track):
    run_dir, _ = track(OFFLINE)
    (folder,) = run_dir.path.glob("wandb/offline-run-*")
    assert not (folder / "files/runs").exists()


def test_a_run_that_continues_offline_keeps_only_what_is_new(track, make_config):
    run_dir, _ = track(OFFLINE)
    (first,) = run_dir.path.glob("wandb/offline-run-*")
    time.sleep(1)  # W&B names its folder after the second
    with Tracker(make_config(*OFFLINE), run_dir, Console(quiet=True), 2) as tracker:
        tracker.log(3, {"loss/total": 0.5678})
        tracker.advance(3)
    (second,) = {*run_dir.path.glob("wandb/offline-run-*")} - {first}
    kept = (second / "run-a_run.wandb").read_bytes()
    assert b"0.5678" in kept and b"0.0123456" not in kept


PROGRAM = """
import os, signal, sys
from pathlib import Path
from rich.console import Console
from spd_core.config import load_config
from spd_core.run_dir import RunDir
from spd_core.tracking import Tracker
run_dir = RunDir(Path(sys.argv[1]))
with Tracker(load_config(run_dir.config_file), run_dir, Console(), 0) as tracker:
    tracker.log(1, {"loss/total": 0.0123456})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_its_values_and_no_process(run_folder):
    _, run_dir = run_folder(OFFLINE)
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", PROGRAM, run_dir.path], check=False, cwd=root)
    assert killed.returncode == -signal.SIGKILL
    wait_until_alone(run_dir)
    (file,) = run_dir.path.glob("wandb/offline-run-*/run-a_run.wandb")
    assert b"0.0123456" in file.read_bytes()


def test_signals_to_the_run_do_not_end_the_upload(track):
    """A scheduler may send them to every process of a task."""

    def send_signals(_tracker, run_dir, _config):
        def later():
            time.sleep(1.5)
            for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
                os.kill(processes_of(run_dir)[0], number)

        threading.Thread(target=later).start()

    run_dir, output = track(OFFLINE, also=send_signals)
    (file,) = run_dir.path.glob("wandb/offline-run-*/run-a_run.wandb")
    assert b"0.0123456" in file.read_bytes() and "failed" not in output


# ---------------------------------------------------------------- W&B is missing, or fails


def test_wandb_that_is_asked_for_but_missing_is_the_users_mistake(track, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"track\.wandb\.mode=offline.*pip install wandb"):
        track(OFFLINE)


@pytest.mark.slow
def test_the_loop_works_without_wandb(make_config, make_run_dir):
    run_dir, config = make_run_dir("run"), make_config()
    program = f"""
import sys, torch
from pathlib import Path
sys.modules["wandb"] = None  # whoever imports it gets an ImportError
from spd_core.config import RunConfig
from spd_core.distributed import Dist
from spd_core.run_dir import RunDir
from spd_core.train import train
config = RunConfig.model_validate_json({config.model_dump_json()!r})
run_dir = RunDir(Path({str(run_dir.path)!r}))
dist = Dist(rank=0, world_size=1, device=torch.device("cpu"))
assert train(config, run_dir, dist, lambda: False, 1, None) == "finished"
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
    assert read_metrics(run_dir)


def assert_one_warning(output, run_dir):
    assert output.count("W&B failed") == 1 and "metrics.jsonl" in output
    assert f"python -m spd_core.upload {run_dir.path}" in output


def test_an_unreachable_server_only_warns(track, monkeypatch):
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    run_dir, output = track(ONLINE, also=finish)
    assert_one_warning(output, run_dir)
    assert time.monotonic() - started < 20


def test_a_missing_api_key_only_warns_and_nobody_is_asked_for_it(track, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    # A terminal, on which nobody answers.
    terminal, end = os.openpty()
    before = os.dup(0)
    os.dup2(end, 0)
    try:
        run_dir, output = track(ONLINE)
    finally:
        os.dup2(before, 0)
        for descriptor in (terminal, end, before):
            os.close(descriptor)
    assert_one_warning(output, run_dir)
    assert "API key" in output or "api_key" in output


@pytest.fixture
def break_wandb(tmp_path, monkeypatch):
    """Replace a method of W&B's run in every new process: what a user's broken W&B does."""

    def replace(method, statement):
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(
            "import sys\nif 'spd_core.upload' in sys.orig_argv:\n    import time, wandb\n"
            f"    def broken(*_, **__):\n        {statement}\n    wandb.Run.{method} = broken\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    return replace


@pytest.mark.parametrize("method", ["log", "save", "finish"])
def test_an_error_inside_wandb_only_warns(method, track, break_wandb):
    break_wandb(method, "raise OSError('[no] space left')")
    run_dir, output = track(OFFLINE, also=finish)
    assert_one_warning(output, run_dir)
    assert "OSError: [no] space left" in output


@pytest.mark.parametrize("method", ["log", "finish"])
def test_wandb_that_hangs_is_left_behind(method, track, break_wandb, monkeypatch):
    monkeypatch.setattr(tracking, "FINISH_S", 4)
    break_wandb(method, "time.sleep(60)")
    started = time.monotonic()
    run_dir, output = track(OFFLINE, also=finish)
    assert_one_warning(output, run_dir)
    assert "no answer within 4 s" in output
    assert time.monotonic() - started < 20


def test_what_fails_early_is_said_early_and_once(run_folder, break_wandb):
    break_wandb("log", "raise OSError('[no] space left')")
    config, run_dir = run_folder(OFFLINE)
    console = Console(file=io.StringIO(), record=True)
    with Tracker(config, run_dir, console, 0) as tracker:
        deadline = time.monotonic() + 30
        while "W&B failed" not in console.export_text(clear=False) and time.monotonic() < deadline:
            tracker.log(1, {"loss/total": 0.5})
            time.sleep(0.1)
        assert_one_warning(console.export_text(clear=False), run_dir)
    assert_one_warning(console.export_text(), run_dir)


# ---------------------------------------------------------------- against a small W&B server


@pytest.fixture
def server(monkeypatch):
    """Answers as much as a run needs, and remembers it. `silent` makes it accept and not answer."""

    class Server(ThreadingHTTPServer):
        silent, upserts, files, history, last_step = False, [], {}, [], None

        def handle_error(self, *_args):
            """A client that gave up is no error of ours."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args):
            pass

        def receive(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            while Server.silent:
                time.sleep(0.1)
            return body

        def reply(self, answer):
            text = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_PUT(self):
            Server.files[urllib.parse.unquote(self.path)[1:]] = self.receive()
            self.reply({})

        def do_POST(self):
            body = json.loads(self.receive())
            lines = (body.get("files") or {}).get("wandb-history.jsonl", {"content": []})
            Server.history += lines["content"]
            self.reply({"data": graphql(body)} if self.path == "/graphql" else {})

    def known():
        if Server.last_step is None:
            return None
        tail = json.dumps([json.dumps({"_step": Server.last_step, "_runtime": 1})])
        counts = {f"{kind}LineCount": Server.last_step for kind in ("history", "events", "log")}
        texts = {"historyTail": tail, "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}"}
        texts["wandbConfig"] = json.dumps({"t": 1})
        return {"id": "r", "name": "a_run", "tags": [], **counts, **texts}

    def graphql(body):
        variables = body.get("variables") or {}
        entity = {"id": "e", "name": "me"}
        if "mutation UpsertBucket" in body["query"]:
            Server.upserts.append(variables)
            project = {"id": "p", "name": "p", "entity": entity}
            bucket = {"id": "r", "name": variables["name"], "project": project, "config": "{}"}
            return {"upsertBucket": {"inserted": True, "bucket": bucket}}
        if "query RunResumeStatus" in body["query"]:
            return {"model": {"id": "p", "name": "p", "entity": entity, "bucket": known()}}
        if "mutation CreateRunFiles" in body["query"]:
            files = [
                {"name": name, "uploadUrl": f"{url}/{urllib.parse.quote(name)}"}
                for name in variables["files"]
            ]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    server = Server(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("WANDB_BASE_URL", url)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Server
    Server.silent = False
    server.shutdown()
    server.server_close()


@pytest.fixture
def upload(monkeypatch):
    """The command of the warning, as a user types it."""
    monkeypatch.setenv("WANDB_SILENT", "true")

    def run(run_dir):
        command = [sys.executable, "-m", "spd_core.upload", str(run_dir.path)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=60)

    return run


def sent(server):
    """The values of each step, as the server has them."""
    rows = {}
    for line in server.history:
        row = json.loads(line)
        rows.setdefault(row["_step"], {}).update(row)
    return rows


def test_online_sends_values_figures_and_files(track, server):
    labels = ("track.wandb.group=a_group", "track.wandb.tags=[x,y]")
    run_dir, output = track((*ONLINE, *labels), also=finish)
    assert "failed" not in output and "W&B: http" in output
    first = server.upserts[0]
    assert (first["name"], first["groupName"], first["tags"]) == ("a_run", "a_group", ["x", "y"])
    assert [sent(server)[step]["loss/total"] for step in (1, 2)] == [0.0123456, 0.0246912]
    assert sent(server)[2]["eval/mmcs/linear1"] == 0.75 and len(sent(server)) == 2
    assert server.files["runs/a_run/config.yaml"] == run_dir.config_file.read_bytes()
    assert b"target" in server.files.values() and b"weights" in server.files.values()
    assert [n for n in server.files if n.startswith("media/images/figures/uv_2_")]


def test_what_wandb_has_is_not_sent_again(track, server, make_config):
    run_dir, _ = track(ONLINE)
    server.history.clear()
    server.last_step = 2  # what a server says of a run that it knows
    with Tracker(make_config(*ONLINE), run_dir, Console(quiet=True), 1) as tracker:
        tracker.log(2, {"loss/total": 0.5})
        tracker.log(3, {"loss/total": 0.25})
        tracker.advance(3)
    assert {step: row["loss/total"] for step, row in sent(server).items()} == {3: 0.25}


def test_what_wandb_lacks_is_sent_later(track, server, upload):
    run_dir, _ = track(("track.wandb.mode=disabled", *ONLINE[1:]), also=finish)
    assert not server.history
    upload(run_dir)
    assert [sent(server)[step]["loss/total"] for step in (1, 2)] == [0.0123456, 0.0246912]
    assert b"target" in server.files.values()


@pytest.mark.parametrize("last_step", [2, 3])
def test_a_server_that_falls_silent_only_warns(last_step, track, server, monkeypatch):
    # Where step 2 of 3 was the last, the run was stopped, and has less time.
    monkeypatch.setattr(tracking, "FINISH_S", 5 if last_step == 2 else 600)
    monkeypatch.setattr(tracking, "STOP_S", 600 if last_step == 2 else 5)

    def fall_silent(_tracker, _run_dir, _config):
        server.silent = True

    started = time.monotonic()
    run_dir, output = track((*ONLINE[::2], f"train.steps={last_step}"), also=fall_silent)
    assert_one_warning(output, run_dir)
    assert time.monotonic() - started < 20


# ---------------------------------------------------------------- the environment


def test_environment(make_run_dir):
    run_dir = make_run_dir("run")
    write_environment(run_dir)
    record = json.loads(run_dir.env_file.read_text())
    assert Path(record["code"], "spd_core").is_dir() and record["torch"] and record["host"]


def test_environment_without_git(make_run_dir, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    write_environment(make_run_dir("run"))
