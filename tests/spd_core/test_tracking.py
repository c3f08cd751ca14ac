import io
import json
import subprocess
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from spd_core import tracking
from spd_core.run_dir import read_metrics
from spd_core.tracking import Tracker, write_environment

OFFLINE = ("track.wandb.mode=offline", "train.steps=2")
ONLINE = ("track.wandb.mode=online", "train.steps=2")


def test_tracker_writes_one_line_per_report(make_config, make_run_dir):
    run_dir = make_run_dir("run")
    with Tracker(make_config(), run_dir, Console(quiet=True), 0) as tracker:
        tracker.log(0, {"loss/total": 0.5, "lr": 0.1})
        tracker.advance(1)
        tracker.log(1, {"eval/loss/x": 0.25})
    records = [{k: v for k, v in r.items() if k != "time"} for r in read_metrics(run_dir)]
    assert records == [{"step": 0, "loss/total": 0.5, "lr": 0.1}, {"step": 1, "eval/loss/x": 0.25}]


@pytest.fixture
def track(make_config, make_run_dir, tmp_path, monkeypatch):
    """Track two steps with these overrides, then `also`; gives the run folder and the output."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")

    def run(overrides, also=lambda _tracker, _run_dir: None):
        run_dir = make_run_dir("a_run")
        console = Console(file=io.StringIO(), record=True)
        with Tracker(make_config(*overrides), run_dir, console, 0) as tracker:
            for step in (1, 2):
                tracker.log(step, {"loss/total": 0.0123456})
                tracker.advance(step)
            also(tracker, run_dir)
        assert [r["step"] for r in read_metrics(run_dir)] == [1, 2]
        return run_dir, console.export_text()

    return run


def send_everything(tracker, run_dir):
    """A figure, and files from two roots."""
    from PIL import Image

    folder = run_dir.figures / "step_2"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "uv.png")
    run_dir.config_file.write_text("seed: 0\n")
    target = run_dir.path / "elsewhere" / "target.safetensors"
    target.parent.mkdir()
    target.write_bytes(b"weights")
    tracker.log_figures(2, folder)
    tracker.log_figures(2, run_dir.figures / "step_1")
    tracker.save_files({"run/config.yaml": run_dir.config_file, "targets/abc/t": target})


def test_offline_keeps_values_figures_and_files_under_the_runs_id(track):
    run_dir, output = track(OFFLINE, also=send_everything)
    (folder,) = run_dir.path.glob("wandb/offline-run-*")
    kept = (folder / "run-a_run.wandb").read_bytes()
    assert b"loss/total" in kept and b"0.0123456" in kept
    assert len(list(folder.glob("files/media/images/figures/uv_2_*.png"))) == 1
    assert (folder / "files/targets/abc/t").read_bytes() == b"weights"
    assert run_dir.config_file.read_text() == "seed: 0\n"
    assert "failed" not in output


def test_a_file_may_not_take_a_name_that_wandb_writes_to(track):
    with pytest.raises(AssertionError, match="without a folder"):
        track(OFFLINE, also=lambda t, d: t.save_files({"config.yaml": d.config_file}))


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


def assert_one_warning(output):
    assert output.count("W&B failed") == 1 and "metrics.jsonl" in output


def test_an_unreachable_server_only_warns(track, monkeypatch):
    monkeypatch.setattr(tracking, "START_S", 1)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    _, output = track(ONLINE, also=send_everything)
    assert_one_warning(output)
    assert time.monotonic() - started < 20


def test_a_missing_api_key_only_warns_and_nobody_is_asked_for_it(track, monkeypatch):
    class Terminal(io.StringIO):
        asked = False

        def isatty(self):
            return True

        def readline(self, *_args):
            Terminal.asked = True
            raise OSError

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    _, output = track(ONLINE)
    assert_one_warning(output)
    assert not Terminal.asked


@pytest.mark.parametrize("method", ["log", "save", "finish"])
def test_an_error_inside_wandb_only_warns(method, track, monkeypatch):
    import wandb

    def fail(*_args, **_kwargs):
        raise OSError("[no] space left")

    monkeypatch.setattr(wandb.Run, method, fail)
    _, output = track(OFFLINE, also=send_everything)
    assert_one_warning(output)
    assert "OSError: [no] space left" in output


@pytest.mark.parametrize("method", ["log", "finish"])
def test_wandb_that_hangs_is_left_behind(method, track, monkeypatch):
    import wandb

    for limit in ("CALL_S", "FINISH_S", "GRACE_S", "STOP_S"):
        monkeypatch.setattr(tracking, limit, 0.2)
    released = threading.Event()
    monkeypatch.setattr(wandb.Run, method, lambda *_args, **_kwargs: released.wait(60))
    started = time.monotonic()
    _, output = track(OFFLINE, also=send_everything)
    assert_one_warning(output)
    assert time.monotonic() - started < 20
    released.set()


# ---------------------------------------------------------------- against a small W&B server


@pytest.fixture
def server(monkeypatch):
    """Answers as much as a run needs, and remembers it. `silent` makes it accept and not answer."""

    class Server(ThreadingHTTPServer):
        silent, upserts, files = False, [], {}

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
            self.reply({"data": graphql(body)} if self.path == "/graphql" else {})

    def graphql(body):
        variables = body.get("variables") or {}
        entity = {"id": "e", "name": "me"}
        if "mutation UpsertBucket" in body["query"]:
            Server.upserts.append(variables)
            project = {"id": "p", "name": "p", "entity": entity}
            bucket = {"id": "r", "name": variables["name"], "project": project, "config": "{}"}
            return {"upsertBucket": {"inserted": True, "bucket": bucket}}
        if "query RunResumeStatus" in body["query"]:
            return {"model": {"id": "p", "name": "p", "entity": entity, "bucket": None}}
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


def test_online_sends_values_figures_and_files(track, server):
    labels = ("track.wandb.group=a_group", "track.wandb.tags=[x,y]")
    _, output = track((*ONLINE, *labels), also=send_everything)
    assert "failed" not in output
    first = server.upserts[0]
    assert (first["name"], first["groupName"], first["tags"]) == ("a_run", "a_group", ["x", "y"])
    assert server.files["run/config.yaml"] == b"seed: 0\n"
    assert server.files["targets/abc/t"] == b"weights"
    assert [n for n in server.files if n.startswith("media/images/figures/uv_2_")]


@pytest.mark.parametrize("last_step", [2, 3])
def test_a_server_that_falls_silent_only_warns(last_step, track, server, monkeypatch):
    # Where step 2 of 3 was the last, the run was stopped, and has less time.
    monkeypatch.setattr(tracking, "FINISH_S", 1 if last_step == 2 else 600)
    monkeypatch.setattr(tracking, "STOP_S", 600 if last_step == 2 else 1)

    def fall_silent(_tracker, _run_dir):
        server.silent = True

    started = time.monotonic()
    _, output = track((*ONLINE, f"train.steps={last_step}"), also=fall_silent)
    assert_one_warning(output)
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
