"""Targets of other runs. How a trained one is kept is tested with its training."""

import json
import shutil

import pytest
import torch
from rich.console import Console
from test_transformer import make_target_config

from spd_core.config import RunConfig
from spd_core.targets.store import read_record, target_folder
from spd_core.targets.train_target import load_or_train_target, load_target
from spd_launch.config import config_to_yaml

QUIET = Console(quiet=True)


@pytest.fixture
def other(make_config, tmp_path):
    """A run with a trained target, in a folder of outputs of its own."""
    run = tmp_path / "theirs" / "runs" / "other"
    run.mkdir(parents=True)
    config = make_config("target.seed=3")
    (run / "config.yaml").write_text(config_to_yaml(config))
    load_or_train_target(config, tmp_path / "theirs" / "targets", QUIET)
    return run


@pytest.mark.parametrize("how", ["folder", "id in SPD_OUT_DIR", "id in the same outputs"])
def test_the_target_of_another_run(how, other, make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPD_OUT_DIR", str(tmp_path / "theirs" if "SPD" in how else tmp_path))
    store = (tmp_path / "theirs" if "same" in how else tmp_path / "ours") / "targets"
    reference = str(other) if how == "folder" else "other"
    # How a target was trained, and on how sparse data, does not matter.
    free = ("target.steps=2", "target.batch_size=7", "data.feature_probability=0.3")
    config = make_config(f"target.from_run={reference}", *free)
    taken = load_or_train_target(config, store, QUIET)
    theirs = load_target(make_config("target.seed=3"), tmp_path / "theirs" / "targets")
    for name, weight in theirs.module.state_dict().items():
        assert torch.equal(taken.module.state_dict()[name], weight)
    record = read_record(config, store)
    assert taken.seed == theirs.seed == record.seed >= 3
    shutil.rmtree(other.parent)
    again = load_or_train_target(config, store, QUIET)  # from the store: their run may be gone
    assert torch.equal(again.module.linear1.weight, theirs.module.linear1.weight)


@pytest.mark.parametrize("overrides, message", [
    (["target.n_hidden=3"], r"target\.n_hidden=2 and 3$"),
    (["target.n_features=6", "target.n_hidden_layers=1"],
     r"target\.n_features=5 and 6; target\.n_hidden_layers=0 and 1$"),
    (["target=resid_mlp", "target.d_mlp=3", "target.n_layers=1", "~target.n_hidden"],
     r"target\.kind=tms and resid_mlp$"),
])  # fmt: skip
def test_a_target_that_does_not_fit_is_refused(overrides, message, other, make_config, tmp_path):
    config = make_config(*overrides, f"target.from_run={other}")
    with pytest.raises(ValueError, match=f"does not fit. There and here: {message}"):
        load_or_train_target(config, tmp_path / "ours", QUIET)
    assert [f.suffix for f in (tmp_path / "ours").iterdir()] == [".lock"]


def test_a_run_that_is_not_there_or_has_no_target(other, make_config, tmp_path):
    with pytest.raises(ValueError, match=r"no run 'nowhere'.*entity/project/id"):
        load_or_train_target(make_config("target.from_run=nowhere"), tmp_path, QUIET)
    shutil.rmtree(tmp_path / "theirs" / "targets")
    with pytest.raises(ValueError, match="has no trained target yet"):
        load_or_train_target(make_config(f"target.from_run={other}"), tmp_path, QUIET)


def test_a_custom_target_is_not_taken_over(other, make_config, tmp_path):
    custom = {"kind": "custom", "class_path": "torch.nn.Linear", "pretrained": None}
    custom |= {"n_features": None, "output": None}
    theirs = RunConfig.model_validate(make_config().model_dump() | {"target": custom})
    (other / "config.yaml").write_text(config_to_yaml(theirs))
    with pytest.raises(ValueError, match=r"use target=custom with its target\.class_path"):
        load_or_train_target(make_config(f"target.from_run={other}"), tmp_path, QUIET)


def text_run(make_config, target, **data):
    whole = {"kind": "text", "source": "stories", "n_documents": 400, "vocab_size": 300}
    whole |= {"path": None, "split": None, "column": None, "tokenizer": None}
    whole |= {"seq_len": 32, "eval_fraction": 0.1, "seed": 0}
    values = make_config().model_dump(mode="json")
    values |= {"data": whole | data, "target": target.model_dump(mode="json")}
    values["eval"]["metrics"] |= {"identity_ci_error": None, "permuted_ci_plots": None}
    return RunConfig.model_validate(values)


@pytest.mark.parametrize("tokenizer, change, refused", [
    (None, {"n_documents": 300}, "data.n_documents=400 and 300"),
    (None, {"seq_len": 16, "seed": 1}, "data.seq_len=32 and 16; data.seed=0 and 1"),
    ("some/name", {"seq_len": 16}, "data.seq_len=32 and 16"),
    ("some/name", {"n_documents": 300, "seed": 1}, None),
    ("some/name", {"tokenizer": "another"}, "data.tokenizer=some/name and another"),
])  # fmt: skip
def test_a_language_model_keeps_its_tokens(
    tokenizer, change, refused, other, make_config, tmp_path
):
    theirs = text_run(make_config, make_target_config(), tokenizer=tokenizer)
    (other / "config.yaml").write_text(config_to_yaml(theirs))
    target = make_target_config(from_run=str(other), steps=3)
    ours = text_run(make_config, target, **({"tokenizer": tokenizer} | change))
    message = f"There and here: {refused}$" if refused else "has no trained target yet"
    with pytest.raises(ValueError, match=message):
        load_or_train_target(ours, tmp_path / "ours" / "targets", QUIET)


def test_a_store_with_the_target_of_another_config_is_refused(make_config, tmp_path):
    config, wide = make_config(), make_config("target.n_hidden=3")
    for c in (config, wide):
        load_or_train_target(c, tmp_path, QUIET)
    folder, other_folder = target_folder(config, tmp_path), target_folder(wide, tmp_path)
    for file in folder.iterdir():
        shutil.copy(other_folder / file.name, file)
    with pytest.raises(ValueError, match=r"another config.*target\.n_hidden=3 and 2$"):
        load_target(config, tmp_path)
    # A record that fits does not hide weights that do not.
    record = json.loads((folder / "target.json").read_text())
    record["config"]["n_hidden"] = 2
    (folder / "target.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"does not fit target and data: .*linear1\.weight"):
        load_target(config, tmp_path)
    (folder / "target.safetensors").write_text("nonsense")
    with pytest.raises(ValueError, match="does not fit target and data"):
        load_target(config, tmp_path)
