import json
import pickle

import pytest
import torch

import spd_core
from spd_core.checkpoint import newest_valid_checkpoint
from spd_core.load import find_run
from spd_core.train import train
from spd_launch.config import config_to_yaml
from spd_launch.upload import files_to_load


@pytest.fixture
def finished(make_config, make_run_dir, one_process):
    run_dir, config = make_run_dir("a_run"), make_config()
    train(config, run_dir, one_process, lambda _step, _values: False)
    run_dir.config_file.write_text(config_to_yaml(config))
    return run_dir


def saved(run_dir):
    from safetensors.torch import load_file

    return load_file(newest_valid_checkpoint(run_dir)[0] / "state.safetensors")


@pytest.mark.parametrize("how", ["folder", "path", "id", "relative"])
def test_a_run_is_found_and_comes_back_whole(how, finished, make_config, monkeypatch):
    out = finished.path.parent.parent
    monkeypatch.setenv("SPD_OUT_DIR", str(out))
    monkeypatch.chdir(out)
    reference = {"folder": str(finished.path), "path": finished.path, "id": "a_run",
                 "relative": "runs/a_run"}[how]  # fmt: skip
    run = spd_core.load_run(reference)
    assert (run.config, run.step) == (make_config(), 6)
    tensors = saved(finished)
    for name, parameter in run.model.trained_parameters().items():
        assert torch.equal(parameter, tensors[f"model:{name}"])
    x = torch.rand(4, 5)
    W, b = run.model.target.linear1.weight, run.model.target.linear2.bias
    torch.testing.assert_close(run.model.run_target(x)[0], (x @ W.T @ W + b).relu())


def test_outputs_is_the_folder_where_none_is_set(finished, monkeypatch):
    monkeypatch.delenv("SPD_OUT_DIR", raising=False)
    monkeypatch.chdir(finished.path)
    (finished.path / "outputs").symlink_to(finished.path.parent.parent)
    assert find_run("a_run").path.resolve() == finished.path.resolve()


@pytest.mark.parametrize(
    "reference",
    [
        "nowhere",
        "a/b",
        "a/b/c/d",
        "",
        "wandb:a/b",
        "https://x.y/",
        "https://wandb.ai/team/toy/sweeps/abc",
        "https://wandb.ai/team/toy/workspace?nw=x",
    ],
)
def test_what_is_no_reference_is_refused_with_the_forms_that_are(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"run id in .*SPD_OUT_DIR.*entity/project/id"):
        spd_core.load_run(reference)


WANDB_FORMS = [
    "team/toy/a_run", "team/toy/runs/a_run", "wandb:team/toy/a_run", "wandb:team/toy/runs/a_run",
    "https://wandb.ai/team/toy/runs/a_run", "https://wandb.ai/team/toy/runs/a_run/overview",
    "https://wandb.ai/team/toy/runs/a_run?nw=abc", "https://wandb.ai/team/toy/runs/a_run/logs",
    "https://wandb.ai/team/toy/runs/a_run/workspace?nw=abc", "team/toy/a_run/",
    "https://wandb.ai/team/toy/runs/a_run/files/runs/a_run", "wandb:http://w:80/team/toy/runs/a_run",
]  # fmt: skip


class Files:
    """The public API of W&B over a folder: the one place where no real server can stand in."""

    def __init__(self, folder, asked):
        self.folder, self.asked = folder, asked

    def run(self, path):
        self.asked.append(path)
        return self

    def files(self):
        return [File(p, str(p.relative_to(self.folder))) for p in self.folder.rglob("*.*")]


class File:
    def __init__(self, path, name):
        self.path, self.name = path, name

    def download(self, root, exist_ok):
        from pathlib import Path

        copy = Path(root) / self.name
        copy.parent.mkdir(parents=True, exist_ok=exist_ok)
        copy.write_bytes(self.path.read_bytes())


@pytest.mark.parametrize("reference", WANDB_FORMS)
def test_every_form_of_a_wandb_reference(reference, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("wandb.Api", lambda **_: Files(tmp_path / "nothing", asked))
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path))
    assert find_run(reference).path == tmp_path / "wandb" / "runs" / "a_run"
    assert asked == ["team/toy/a_run"]


def test_a_wandb_run_is_downloaded_and_loaded(finished, make_config, tmp_path, monkeypatch):
    import shutil

    uploaded, asked = tmp_path / "uploaded", []
    for name, path in files_to_load(finished, make_config()).items():
        assert "/" in name  # at the top W&B writes files of its own, among them a config.yaml
        (uploaded / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, uploaded / name)
    monkeypatch.setattr("wandb.Api", lambda **_: Files(uploaded, asked))
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "elsewhere"))
    run = spd_core.load_run("team/toy/a_run")
    assert asked == ["team/toy/a_run"] and run.step == 6


@pytest.mark.slow
def test_a_wandb_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with pytest.raises(ValueError, match="team/toy/run-1 from W&B"):
        spd_core.load_run("team/toy/run-1")


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


def test_a_checkpoint_that_would_run_code_is_not_executed(finished):
    import hashlib

    folder, step, _ = newest_valid_checkpoint(finished)
    bomb = pickle.dumps(Bomb())
    (folder / "state.safetensors").write_bytes(bomb)
    meta = {"step": step, "sha256": hashlib.sha256(bomb).hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="holds no tensors"):
        spd_core.load_run(finished.path)


@pytest.mark.parametrize("edit, message", [
    (("seed: 0", "sede: 0"), r"config\.yaml .*sede"),
    (("hidden:\n    - 3", "hidden:\n    - 4"), "does not fit"),
    (("n_hidden: 2", "n_hidden: 3"), "no target at"),
])  # fmt: skip
def test_files_that_do_not_fit_each_other_are_refused(edit, message, finished):
    text = finished.config_file.read_text()
    assert edit[0] in text
    finished.config_file.write_text(text.replace(*edit))
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        spd_core.load_run(finished.path)


def test_importing_the_package_loads_no_torch():
    import subprocess
    import sys

    code = "import sys, spd_core; assert 'torch' not in sys.modules; spd_core.load_run"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = spd_core.nothing
