import json
import os

import pytest
import torch

from spd_core.checkpoint import (
    checkpoint_steps,
    load_checkpoint,
    load_model,
    newest_valid_checkpoint,
    save_checkpoint,
    set_aside,
)
from spd_core.train import build_optimizer


@pytest.fixture
def trained(make_config, tms_model):
    """A model and its optimiser after one step."""

    def make(seed):
        model = tms_model(f"seed={seed}")
        optimizer = build_optimizer(make_config(), model)
        for parameter in model.trained_parameters().values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        return model, optimizer

    return make


@pytest.fixture
def run_dir(make_run_dir):
    return make_run_dir("run")


def damage(run_dir, step, how):
    folder = run_dir.checkpoints / f"step_{step}"
    state = folder / "state.safetensors"
    match how:
        case "flipped bit":
            data = bytearray(state.read_bytes())
            data[-1] ^= 1
            state.write_bytes(data)
        case "cut short":
            state.write_bytes(state.read_bytes()[:-10])
        case "no meta":
            (folder / "meta.json").unlink()
        case "half a meta":
            (folder / "meta.json").write_text('{"step": ')


def test_round_trip_is_exact(trained, run_dir):
    model, optimizer = trained(0)
    save_checkpoint(run_dir, 7, model, optimizer, {}, keep=2)
    folder, step, damaged = newest_valid_checkpoint(run_dir)
    assert (step, damaged) == (7, {})
    other, other_optimizer = trained(1)
    load_checkpoint(folder, other, other_optimizer)
    pairs = zip(
        model.trained_parameters().values(), other.trained_parameters().values(), strict=True
    )
    for a, b in pairs:
        assert torch.equal(a, b)
        state, other_state = optimizer.state[a], other_optimizer.state[b]
        assert state.keys() == other_state.keys() >= {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(state[k], other_state[k]) for k in state)


def test_load_model_alone(trained, run_dir):
    model, optimizer = trained(0)
    save_checkpoint(run_dir, 7, model, optimizer, {}, keep=2)
    other, _ = trained(1)
    load_model(newest_valid_checkpoint(run_dir)[0], other)
    assert torch.equal(model.components["linear1"].V, other.components["linear1"].V)


def test_keep(trained, run_dir):
    for step in (2, 10, 4, 8):
        save_checkpoint(run_dir, step, *trained(0), {}, keep=3)
    assert checkpoint_steps(run_dir) == [4, 8, 10]


@pytest.mark.parametrize("how", ["flipped bit", "cut short", "no meta", "half a meta"])
def test_a_damaged_newest_falls_back(how, trained, run_dir):
    for step in (2, 4):
        save_checkpoint(run_dir, step, *trained(0), {}, keep=2)
    damage(run_dir, 4, how)
    folder, step, damaged = newest_valid_checkpoint(run_dir)
    assert (folder.name, step) == ("step_2", 2) and [f.name for f in damaged] == ["step_4"]
    damage(run_dir, 2, how)
    with pytest.raises(FileNotFoundError, match="step_2"):
        newest_valid_checkpoint(run_dir)


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(trained, run_dir):
    for step in (2, 4):
        save_checkpoint(run_dir, step, *trained(0), {}, keep=2)
    damage(run_dir, 4, "flipped bit")
    save_checkpoint(run_dir, 4, *trained(0), {}, keep=2)
    assert newest_valid_checkpoint(run_dir)[1:] == (4, {})


def test_what_is_set_aside_is_not_kept_in_place_of_a_valid_one(trained, run_dir):
    for step in (2, 4):
        save_checkpoint(run_dir, step, *trained(0), {}, keep=2)
    damage(run_dir, 4, "flipped bit")
    for folder in newest_valid_checkpoint(run_dir)[2]:
        set_aside(folder)
    save_checkpoint(run_dir, 3, *trained(0), {}, keep=2)
    assert checkpoint_steps(run_dir) == [2, 3]
    assert newest_valid_checkpoint(run_dir)[1:] == (3, {})


def test_leftover_temporary_folders_are_removed_and_never_loaded(trained, run_dir):
    leftover = run_dir.checkpoints / ".step_abc"
    leftover.mkdir(parents=True)
    (leftover / "state.safetensors").write_bytes(b"half")
    assert checkpoint_steps(run_dir) == []
    save_checkpoint(run_dir, 2, *trained(0), {}, keep=2)
    assert [f.name for f in run_dir.checkpoints.iterdir()] == ["step_2"]
    assert newest_valid_checkpoint(run_dir)[1] == 2


def test_a_failure_while_saving_leaves_no_checkpoint(trained, run_dir, monkeypatch):
    monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(run_dir, 2, *trained(0), {}, keep=2)
    assert checkpoint_steps(run_dir) == []


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_meta_names_the_step_and_folders_are_readable(trained, run_dir):
    save_checkpoint(run_dir, 2, *trained(0), {}, keep=2)
    folder = run_dir.checkpoints / "step_2"
    assert json.loads((folder / "meta.json").read_text())["step"] == 2
    assert folder.stat().st_mode & 0o777 == 0o755
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in folder.iterdir())
