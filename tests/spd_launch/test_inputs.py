"""What is looked at before anything is sent; hub names against a server of our own."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LM = ["+experiment=ss_llama_simple-1L", "cluster=local"]
GPT2 = ["+experiment=gpt2", "cluster=local"]
CODE = """
import json, sys
from spd_launch.compose import compose
from spd_launch.errors import LaunchError
from spd_launch.inputs import check_inputs
from spd_launch.validate import validate

for arguments in json.loads(sys.argv[1]):
    try:
        check_inputs(validate(compose(arguments, False)[0].values))
        print("fine")
    except LaunchError as error:
        print(json.dumps(str(error)))
"""


def check(tmp_path: Path, *launches: list[str], **environment: str) -> list[str]:
    """What the check says to each launch, in a process of its own: the hub is set at import."""
    ours = {"SPD_OUT_DIR": str(tmp_path / "out"), "HF_HOME": str(tmp_path / "hf")}
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | ours | environment
    command = [sys.executable, "-c", CODE, json.dumps(launches)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


class Hub(BaseHTTPRequestHandler):
    """Knows one model and one dataset, and answers as the hub does."""

    def do_GET(self) -> None:
        known = self.path.split("?")[0] in ("/api/models/own/tokenizer", "/api/datasets/own/text")
        body = json.dumps({"id": "own/it", "_id": "0", "siblings": [], "tags": []}).encode()
        self.send_response(200 if known else 404)
        if not known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_names_on_the_hub(hub: str, tmp_path: Path) -> None:
    here = ["data.tokenizer=own/tokenizer", "data.path=own/text"]
    answers = check(
        tmp_path,
        [*LM, *here],
        [*LM, *here, "data.tokenizer=own/nothing"],
        [*LM, *here, "data.path=own/nothing"],
        [*LM, *here, "data.tokenizer=/no/such/folder"],
        HF_ENDPOINT=hub,
    )
    assert answers[0] == "fine"
    assert f"data.tokenizer=own/nothing: {hub} has no such model" in answers[1]
    assert f"data.path=own/nothing: {hub} has no such dataset" in answers[2]
    assert "data.tokenizer=/no/such/folder: there is no such folder" in answers[3]


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    downloaded = tmp_path / "hf" / "hub" / "models--own--tokenizer"
    downloaded.mkdir(parents=True)
    (tmp_path / "hf" / "datasets" / "own___text").mkdir(parents=True)
    (tmp_path / "a folder").mkdir()
    known = ["data.tokenizer=own/tokenizer", "data.path=own/text"]
    answers = check(
        tmp_path,
        LM,
        [*LM, "data.tokenizer=own/tokenizer"],
        GPT2,
        [*LM, *known],
        [*LM, f"data.tokenizer='{tmp_path / 'a folder'}'", "data.path=own/text"],
        [*LM, "cluster.env={HF_HOME: /elsewhere}"],
        [*LM, "data=stories"],
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    for i, field in enumerate(("data.tokenizer", "data.path", "target.pretrained")):
        answer = answers[i]
        assert answer.startswith(f'"{field}=') and "the hub cannot be reached" in answer
        assert "HF_HUB_OFFLINE=1" in answer and "\\n" not in answer
    assert "data.tokenizer=null" in answers[0] and "data.source=stories" in answers[1]
    assert answers[3:] == ["fine"] * 4
    offline = check(tmp_path, LM, [*LM, *known], HF_HUB_OFFLINE="1")
    assert "offline mode is enabled" in offline[0] and offline[1] == "fine"


def test_a_class_that_is_not_there(tmp_path: Path) -> None:
    own = ["+experiment=custom", "cluster=local", "decompose.modules={h: 3}"]
    answers = check(
        tmp_path,
        [*own, "target.class_path=transformers.GPT2LMHeadMode"],
        [*own, "target.class_path=torch.nn.Linear"],
    )
    assert "target.class_path=transformers.GPT2LMHeadMode" in answers[0]
    assert answers[1] == "fine"


def test_a_corpus_is_looked_at_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"fine\n\xff\xfe")
    command = [sys.executable, "-m", "spd_launch", *LM, "cluster=cpu", "data=files"]
    path, out = f"data.path='{tmp_path}/*.txt'", tmp_path / "out"
    done = subprocess.run(
        [*command, path, f"launch.out_dir='{out}'"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and not out.exists()
    assert done.stderr == (
        f"error: {tmp_path}/latin.txt is not UTF-8: byte 0xff at offset 5; convert it with iconv\n"
    )
