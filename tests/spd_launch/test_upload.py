"""W&B beside a run: real processes, a small server, and what can fail."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from contextlib import suppress
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from launches import launched
from PIL import Image

from spd_core.config import load_config
from spd_core.run_dir import append_metrics, truncate_metrics
from spd_core.targets.train_target import target_folder
from spd_launch import upload
from spd_launch.config import config_to_yaml
from spd_launch.errors import LaunchError
from spd_launch.ledger import read_task_rows
from spd_launch.run_record import Status, write_status
from spd_launch.upload import uploading

REPO = Path(__file__).parents[2]
# A target of this seed is in no store: its files are made up.
OFFLINE = ("track.wandb.mode=offline", "target.seed=77")
ONLINE = ("track.wandb.mode=online", "target.seed=77")


@pytest.fixture
def run_folder(make_config, make_run_dir, tmp_path, monkeypatch):
    """The folder of a run with these overrides, as it is before it trains."""
    monkeypatch.setenv("WANDB_SERVICE", "a service that is no more")  # of whoever used W&B before
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)

    def make(overrides):
        config, run_dir = make_config(*overrides), make_run_dir("a_run")
        run_dir.config_file.write_text(config_to_yaml(config))
        set_state(run_dir, "running")
        return config, run_dir

    return make


@pytest.fixture
def track(run_folder):
    """Log two steps of a run with these overrides, then do something else."""

    def run(overrides, then=lambda _run_dir, _config: None):
        config, run_dir = run_folder(overrides)
        with uploading(config, run_dir):
            started = time.monotonic()
            for step in (1, 2):
                append_metrics(run_dir, {"step": step, "loss/total": 0.0123456 * step})
            then(run_dir, config)
            assert time.monotonic() - started < 10  # W&B holds nothing up, whatever it does
        wait_until_alone(run_dir)
        return run_dir

    return run


def set_state(run_dir, state):
    fields = {"step": 2, "steps": 2, "heartbeat": 0.0, "attempt": 1, "job_id": None, "host": "h"}
    write_status(run_dir, Status(state=state, **fields))


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


def ignores(process, number):
    status = Path(f"/proc/{process}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def wait_until_alone(run_dir):
    deadline = time.monotonic() + 30
    while processes_of(run_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(run_dir)


def save_checkpoint(run_dir, step):
    folder = run_dir.checkpoints / f"step_{step}"
    folder.mkdir(parents=True)
    (folder / "state.safetensors").write_bytes(b"weights")
    meta = {"step": step, "sha256": sha256(b"weights").hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))


def finish(run_dir, config):
    """What the last evaluation and the last checkpoint leave, beside a target from elsewhere."""
    (run_dir.figures / "step_2").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(run_dir.figures / "step_2" / "uv.png")
    append_metrics(run_dir, {"step": 2, "eval/mmcs/linear1": 0.75})
    save_checkpoint(run_dir, 2)
    target = target_folder(config, run_dir.targets)
    target.mkdir(exist_ok=True)
    (target / "target.safetensors").write_bytes(b"target")
    set_state(run_dir, "finished")


def test_offline_keeps_values_figures_and_files_under_the_runs_id(track, make_config, capfd):
    run_dir = track(OFFLINE, finish)
    (folder,) = run_dir.path.glob("wandb/offline-run-*")
    kept = (folder / "run-a_run.wandb").read_bytes()
    assert b"loss/total" in kept and b"0.0123456" in kept and b"mmcs" in kept
    assert len(list(folder.glob("files/media/images/figures/uv_2_*.png"))) == 1
    digest = target_folder(make_config(*OFFLINE), run_dir.targets).name
    assert (folder / f"files/targets/{digest}/target.safetensors").read_bytes() == b"target"
    assert (folder / "files/runs/a_run/checkpoints/step_2/meta.json").exists()
    # W&B keeps a config.yaml of its own, and ours is not that.
    assert run_dir.config_file.read_text() == config_to_yaml(make_config(*OFFLINE))
    output = capfd.readouterr().out
    assert "failed" not in output and f"wandb sync {folder}" in output


def test_what_is_stopped_has_values_and_no_files(track):
    run_dir = track(OFFLINE, lambda run_dir, _config: set_state(run_dir, "stopped"))
    (folder,) = run_dir.path.glob("wandb/offline-run-*")
    assert b"0.0123456" in (folder / "run-a_run.wandb").read_bytes()
    assert not (folder / "files/runs").exists()


@pytest.mark.slow
def test_a_run_that_continues_offline_keeps_only_what_is_new(track):
    run_dir = track(OFFLINE, lambda run_dir, _config: save_checkpoint(run_dir, 1))
    (first,) = run_dir.path.glob("wandb/offline-run-*")
    time.sleep(1)  # W&B names its folder after the second
    with uploading(load_config(run_dir.config_file), run_dir):
        truncate_metrics(run_dir, 1)
        append_metrics(run_dir, {"step": 2, "loss/total": 0.5678})
        append_metrics(run_dir, {"step": 3, "loss/total": 0.8765})
    (second,) = {*run_dir.path.glob("wandb/offline-run-*")} - {first}
    kept = (second / "run-a_run.wandb").read_bytes()
    assert b"0.5678" in kept and b"0.8765" in kept and b"0.0123456" not in kept


PROGRAM = """
import os, signal, sys
from pathlib import Path
from spd_core.config import load_config
from spd_core.run_dir import RunDir, append_metrics
from spd_launch.upload import uploading
run_dir = RunDir(Path(sys.argv[1]))
with uploading(load_config(run_dir.config_file), run_dir):
    append_metrics(run_dir, {"step": 1, "loss/total": 0.0123456})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_its_values_and_no_process(run_folder):
    _, run_dir = run_folder(OFFLINE)
    command = [sys.executable, "-c", PROGRAM, run_dir.path]
    killed = subprocess.run(command, check=False, cwd=REPO)
    assert killed.returncode == -signal.SIGKILL
    wait_until_alone(run_dir)
    (file,) = run_dir.path.glob("wandb/offline-run-*/run-a_run.wandb")
    assert b"0.0123456" in file.read_bytes()


def test_signals_to_the_run_do_not_end_the_upload(track, capfd):
    """A scheduler may send them to every process of a task."""
    loaded = []

    def send_signals(run_dir, _config):
        def later():
            while not (found := [p for p in processes_of(run_dir) if ignores(p, signal.SIGTERM)]):
                time.sleep(0.02)
            (process,) = found
            loaded.append(Path(f"/proc/{process}/maps").read_text())
            for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
                os.kill(process, number)

        threading.Thread(target=later).start()

    run_dir = track(OFFLINE, send_signals)
    (file,) = run_dir.path.glob("wandb/offline-run-*/run-a_run.wandb")
    assert b"0.0123456" in file.read_bytes() and "failed" not in capfd.readouterr().out
    assert "torch" not in loaded[0]  # it takes nothing from the training


# ---------------------------------------------------------------- W&B is missing, or fails


def test_wandb_that_is_asked_for_but_missing_is_the_users_mistake(track, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(LaunchError, match=r"track\.wandb\.mode=offline.*pip install wandb"):
        track(OFFLINE)


def the_warning(output, run_dir):
    assert output.count("W&B failed") == 1 and "metrics.jsonl" in output
    assert f"python -m spd_launch.upload {run_dir.path}" in output
    return output


def test_an_unreachable_server_only_warns(track, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    run_dir = track(ONLINE, finish)
    the_warning(capfd.readouterr().out, run_dir)
    assert time.monotonic() - started < 50


def test_a_missing_api_key_only_warns_and_nobody_is_asked_for_it(track, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    # A terminal, on which nobody answers.
    terminal, end = os.openpty()
    before = os.dup(0)
    os.dup2(end, 0)
    try:
        run_dir = track(ONLINE)
    finally:
        os.dup2(before, 0)
        for descriptor in (terminal, end, before):
            os.close(descriptor)
    assert "api_key" in the_warning(capfd.readouterr().out, run_dir)


@pytest.fixture
def break_wandb(tmp_path, monkeypatch):
    """Replace a method of W&B's run in the process beside a run, as a broken W&B would."""

    def replace(method, statement):
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(
            "import sys\nif 'spd_launch.upload' in sys.orig_argv:\n    import time, wandb\n"
            f"    def broken(*_, **__):\n        {statement}\n    wandb.Run.{method} = broken\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    return replace


@pytest.mark.slow
@pytest.mark.parametrize("method", ["log", "save", "finish"])
def test_an_error_inside_wandb_only_warns(method, track, break_wandb, capfd):
    break_wandb(method, "raise OSError('[no] space left')")
    run_dir = track(OFFLINE, finish)
    assert "OSError: [no] space left" in the_warning(capfd.readouterr().out, run_dir)
    assert "Traceback" in (run_dir.path / "upload.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["log", "finish"])
def test_wandb_that_hangs_is_left_behind(method, track, break_wandb, monkeypatch, capfd):
    monkeypatch.setattr(upload, "FINISH_S", 4)
    break_wandb(method, "time.sleep(60)")
    started = time.monotonic()
    run_dir = track(OFFLINE, finish)
    assert "no answer within 4 s" in the_warning(capfd.readouterr().out, run_dir)
    assert time.monotonic() - started < 50


def test_a_process_that_stands_still_is_left_behind(track, monkeypatch, capfd):
    monkeypatch.setattr(upload, "STOP_S", 0.5)

    def stand_still(run_dir, _config):
        while not (found := processes_of(run_dir)):  # it has just been started
            time.sleep(0.01)
        os.kill(found[0], signal.SIGSTOP)

    run_dir = track(ONLINE, stand_still)
    assert "no answer within 0.5 s" in the_warning(capfd.readouterr().out, run_dir)


def cpu_s(session):
    """CPU seconds that all processes of a session have used."""
    ticks = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15])) if int(fields[3]) == session else 0
    return ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
def test_an_outage_takes_next_to_nothing_of_a_core(run_folder, monkeypatch):
    """A server that accepts and never answers, while a line of metrics comes every second.

    It is below 2 % where nothing else runs.
    """
    monkeypatch.setattr(upload, "STOP_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        config, run_dir = run_folder(ONLINE)
        with uploading(config, run_dir):
            used, deadline = [0.0] * 4, time.monotonic() + 60
            while not (found := processes_of(run_dir)):  # it has just been started
                assert time.monotonic() < deadline
            session = found[0]
            while used[-1] < 0.5 or used[-1] - used[-4] > 0.1:  # it is starting
                assert time.monotonic() < deadline
                time.sleep(1)
                used.append(cpu_s(session))
            for step in range(1, 16):
                append_metrics(run_dir, {"step": step, "loss/total": 0.5})
                time.sleep(1)
            assert 0 < cpu_s(session) - used[-1] < 0.1 * 15


def test_what_fails_is_said_while_the_run_goes_on(run_folder, break_wandb, capfd):
    break_wandb("log", "raise OSError('[no] space left')")
    config, run_dir = run_folder(OFFLINE)
    append_metrics(run_dir, {"step": 1, "loss/total": 0.5})
    output, deadline = "", time.monotonic() + 30
    with uploading(config, run_dir):
        while "missing" not in output and time.monotonic() < deadline:
            time.sleep(0.1)
            output += capfd.readouterr().out
        the_warning(output, run_dir)
    assert "W&B failed" not in capfd.readouterr().out  # said once; W&B adds words of its own


# ---------------------------------------------------------------- against a small W&B server


@pytest.fixture
def server(monkeypatch):
    """Answers as much as a run needs, and remembers it. `silent` makes it accept and not answer."""

    class Server(ThreadingHTTPServer):
        silent, upserts, views, files, history, last_step = False, [], [], {}, [], None

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
        if "mutation UpsertView" in body["query"]:
            Server.views.append(variables)
            return {"upsertView": {"view": {"id": "v", "name": "nw-v"}, "inserted": True}}
        if "query RunResumeStatus" in body["query"]:
            return {"model": {"id": "p", "name": "p", "entity": entity, "bucket": known()}}
        if "mutation CreateRunFiles" in body["query"]:
            files = [
                {"name": name, "uploadUrl": f"{url}/{urllib.parse.quote(name)}"}
                for name in variables["files"]
            ]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "viewer" in body["query"]:
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}"}}
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
def upload_command(monkeypatch):
    """The command of the warning, as a user types it."""
    monkeypatch.delenv("WANDB_SERVICE")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def run(run_dir, code=0):
        command = [sys.executable, "-m", "spd_launch.upload", str(run_dir.path)]
        done = subprocess.run(command, check=False, cwd=REPO, timeout=60)
        assert done.returncode == code

    return run


def sent(server):
    """The values of each step, as the server has them."""
    rows = {}
    for line in server.history:
        row = json.loads(line)
        rows.setdefault(row["_step"], {}).update(row)
    return rows


def losses(server):
    return {step: row["loss/total"] for step, row in sent(server).items()}


def test_online_sends_values_figures_and_files(track, server, capfd):
    labels = ("track.wandb.group=a_group", "track.wandb.tags=[x,y]")
    run_dir = track((*ONLINE, *labels), finish)
    output = capfd.readouterr().out
    assert "failed" not in output and "W&B: http" in output
    first = server.upserts[0]
    assert (first["name"], first["groupName"], first["tags"]) == ("a_run", "a_group", ["x", "y"])
    assert losses(server) == {1: 0.0123456, 2: 0.0246912}
    assert sent(server)[2]["eval/mmcs/linear1"] == 0.75
    assert server.files["runs/a_run/config.yaml"] == run_dir.config_file.read_bytes()
    assert b"target" in server.files.values() and b"weights" in server.files.values()
    assert [n for n in server.files if n.startswith("media/images/figures/uv_2_")]


@pytest.mark.slow
def test_the_first_run_of_a_sweep_saves_a_view_of_it(server, monkeypatch, tmp_path, run_folder):
    pytest.importorskip("wandb_workspaces")
    run_folder(ONLINE)  # the surroundings
    launch = launched(tmp_path / "out", "running", "running", track__wandb__mode="online")
    monkeypatch.setenv("SPD_LAUNCH", str(launch.path))
    for row in read_task_rows(launch):
        run_dir = launch.run_dir(row.name)
        with uploading(load_config(run_dir.config_file), run_dir):
            append_metrics(run_dir, {"step": 1, "loss/total": 0.5})
            saved, deadline = launch.path / "wandb_view.txt", time.monotonic() + 60
            while not (saved.exists() and saved.read_text()) and time.monotonic() < deadline:
                time.sleep(0.2)
        assert "nw=v" in saved.read_text()
    groups = {upsert["groupName"] for upsert in server.upserts} - {None}
    assert groups == {launch.launch_id}
    (view,) = server.views
    assert (view["displayName"], view["entityName"]) == (launch.launch_id, "me")
    assert launch.launch_id in json.dumps(json.loads(view["spec"])["section"]["runSets"])


@pytest.mark.slow
def test_what_wandb_has_is_not_sent_again(track, server):
    run_dir = track(ONLINE, lambda run_dir, _config: save_checkpoint(run_dir, 1))
    server.history.clear()
    server.last_step = 2  # what a server says of a run that it knows
    with uploading(load_config(run_dir.config_file), run_dir):
        truncate_metrics(run_dir, 1)
        append_metrics(run_dir, {"step": 2, "loss/total": 0.5})
        append_metrics(run_dir, {"step": 3, "loss/total": 0.25})
    assert losses(server) == {3: 0.25}


@pytest.mark.slow
def test_what_wandb_lacks_is_sent_later(track, server, upload_command):
    run_dir = track(("track.wandb.mode=disabled", *ONLINE[1:]), finish)
    assert not server.history
    upload_command(run_dir)
    assert losses(server) == {1: 0.0123456, 2: 0.0246912}
    assert b"target" in server.files.values()


@pytest.mark.slow
def test_what_is_sent_later_is_in_the_group_of_its_launch(
    server, run_folder, tmp_path, upload_command
):
    run_folder(ONLINE)  # the surroundings
    launch = launched(tmp_path / "out", "stopped")
    (run,) = read_task_rows(launch)
    append_metrics(launch.run_dir(run.name), {"step": 1, "loss/total": 0.5})
    upload_command(launch.run_dir(run.name))
    assert losses(server) == {1: 0.5}
    assert {upsert["groupName"] for upsert in server.upserts} - {None} == {launch.launch_id}


def test_a_folder_that_is_no_run_is_named(make_run_dir, capfd):
    command = [sys.executable, "-m", "spd_launch.upload", str(make_run_dir("empty").path)]
    assert subprocess.run(command, check=False, cwd=REPO).returncode == 2
    assert "error: no run config at" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_a_server_that_falls_silent_only_warns(state, track, server, monkeypatch, capfd):
    # Where the run was stopped it has less time.
    monkeypatch.setattr(upload, "FINISH_S", 5 if state == "finished" else 600)
    monkeypatch.setattr(upload, "STOP_S", 600 if state == "finished" else 5)

    def fall_silent(run_dir, _config):
        set_state(run_dir, state)
        server.silent = True

    started = time.monotonic()
    run_dir = track(ONLINE, fall_silent)
    assert "no answer within 5 s" in the_warning(capfd.readouterr().out, run_dir)
    assert time.monotonic() - started < 50
