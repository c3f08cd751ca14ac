import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from spd_core.checkpoint import (
    checkpoint_steps,
    load_checkpoint,
    load_model,
    newest_valid_checkpoint,
    save_checkpoint,
    set_aside,
    training_state,
)
from spd_core.config import CheckpointConfig
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


def save(run_dir, step, trained, keep=2, keep_every=None, every_steps=1):
    run_dir.metrics_file.touch()
    options = CheckpointConfig(every_steps=every_steps, keep=keep, keep_every=keep_every)
    save_checkpoint(run_dir, step, training_state(*trained, {}), options)


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
    save(run_dir, 7, (model, optimizer))
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
    save(run_dir, 7, (model, optimizer))
    other, _ = trained(1)
    load_model(newest_valid_checkpoint(run_dir)[0], other)
    assert torch.equal(model.components["linear1"].V, other.components["linear1"].V)


def test_keep(trained, run_dir):
    for step in (2, 10, 4, 8):
        save(run_dir, step, trained(0), keep=3)
    assert checkpoint_steps(run_dir) == [4, 8, 10]


def test_every_nth_is_kept_as_well(trained, run_dir):
    for step in (2, 4, 6, 8, 10, 12, 14):
        save(run_dir, step, trained(0), keep=2, keep_every=4)
    assert checkpoint_steps(run_dir) == [4, 8, 12, 14]


def test_those_of_stops_do_not_push_out_the_planned_ones(trained, run_dir):
    kept = []
    for step in (4, 8, 9, 10, 12):  # planned are multiples of 4
        save(run_dir, step, trained(0), keep=2, every_steps=4)
        kept.append(checkpoint_steps(run_dir))
    assert kept == [[4], [4, 8], [8, 9], [8, 10], [8, 12]]


def test_what_is_written_is_the_state_of_the_moment(trained, run_dir):
    """Training goes on while it is written."""
    model, optimizer = trained(0)
    state = training_state(model, optimizer, {"a": torch.ones(2)})
    before = model.components["linear1"].V.detach().clone()
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.zero_()
            optimizer.state[parameter]["exp_avg"].zero_()
    run_dir.metrics_file.touch()
    save_checkpoint(run_dir, 2, state, CheckpointConfig(every_steps=1, keep=1, keep_every=None))
    extra = load_checkpoint(run_dir.checkpoints / "step_2", model, optimizer)
    assert torch.equal(model.components["linear1"].V, before) and extra["a"].tolist() == [1, 1]
    assert all(s["exp_avg"].any() for s in optimizer.state.values())


def test_another_format_is_refused_and_not_set_aside(trained, run_dir):
    save(run_dir, 2, trained(0))
    file = run_dir.checkpoints / "step_2" / "state.safetensors"
    save_file(load_file(file), file, {"format": "7"})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (file.parent / "meta.json").write_text(json.dumps({"step": 2, "sha256": digest}))
    folder, _, damaged = newest_valid_checkpoint(run_dir)
    assert not damaged
    with pytest.raises(ValueError, match="format 7, and this code reads format 1"):
        load_model(folder, trained(0)[0])


def test_what_was_saved_before_there_were_formats_is_read(trained, run_dir):
    save(run_dir, 2, trained(0))
    file = run_dir.checkpoints / "step_2" / "state.safetensors"
    save_file(load_file(file), file)
    load_model(file.parent, trained(1)[0])


@pytest.mark.parametrize("how", ["flipped bit", "cut short", "no meta", "half a meta"])
def test_a_damaged_newest_falls_back(how, trained, run_dir):
    for step in (2, 4):
        save(run_dir, step, trained(0))
    damage(run_dir, 4, how)
    folder, step, damaged = newest_valid_checkpoint(run_dir)
    assert (folder.name, step) == ("step_2", 2) and [f.name for f in damaged] == ["step_4"]
    damage(run_dir, 2, how)
    with pytest.raises(FileNotFoundError, match="step_2"):
        newest_valid_checkpoint(run_dir)


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(trained, run_dir):
    for step in (2, 4):
        save(run_dir, step, trained(0))
    damage(run_dir, 4, "flipped bit")
    save(run_dir, 4, trained(0))
    assert newest_valid_checkpoint(run_dir)[1:] == (4, {})


def test_what_is_set_aside_is_not_kept_in_place_of_a_valid_one(trained, run_dir):
    for step in (2, 4):
        save(run_dir, step, trained(0))
    damage(run_dir, 4, "flipped bit")
    for folder in newest_valid_checkpoint(run_dir)[2]:
        set_aside(folder)
    save(run_dir, 3, trained(0))
    assert checkpoint_steps(run_dir) == [2, 3]
    assert newest_valid_checkpoint(run_dir)[1:] == (3, {})


def test_leftover_temporary_folders_are_removed_and_never_loaded(trained, run_dir):
    leftover = run_dir.checkpoints / ".step_abc"
    leftover.mkdir(parents=True)
    (leftover / "state.safetensors").write_bytes(b"half")
    assert checkpoint_steps(run_dir) == []
    save(run_dir, 2, trained(0))
    assert [f.name for f in run_dir.checkpoints.iterdir()] == ["step_2"]
    assert newest_valid_checkpoint(run_dir)[1] == 2


def test_a_failure_while_saving_leaves_no_checkpoint(trained, run_dir, monkeypatch):
    monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(run_dir, 2, trained(0))
    assert checkpoint_steps(run_dir) == []


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_meta_names_the_step_and_folders_are_readable(trained, run_dir):
    save(run_dir, 2, trained(0))
    folder = run_dir.checkpoints / "step_2"
    assert json.loads((folder / "meta.json").read_text())["step"] == 2
    assert folder.stat().st_mode & 0o777 == 0o755
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in folder.iterdir())
