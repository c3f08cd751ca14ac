import pytest
import torch
from rich.console import Console

from spd_core.randomness import stream
from spd_core.targets.tms import TMS, tms_problem, train_tms
from spd_core.targets.train_target import load_or_train_target

QUIET = Console(quiet=True)


def test_the_second_call_loads_the_same_weights(make_config, tmp_path):
    config = make_config()
    target = load_or_train_target(config, tmp_path, QUIET)
    first, seed = target.module, target.seed
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.safetensors")}
    again = load_or_train_target(config, tmp_path, QUIET)
    second, same_seed = again.module, again.seed
    assert len(files) == 1 and all(f.stat().st_mtime_ns == t for f, t in files.items())
    assert seed == same_seed
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    assert tms_problem(first) is None
    assert torch.equal(first.linear2.weight, first.linear1.weight.T)


def test_another_target_or_other_data_is_another_entry(make_config, tmp_path):
    for override in ("seed=5", "target.steps=151", "data.feature_probability=0.06"):
        load_or_train_target(make_config(override), tmp_path, QUIET)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_a_target_without_every_feature_is_rejected(make_config, tmp_path):
    config = make_config("target.steps=1", "target.n_seeds=2")
    with pytest.raises(ValueError, match=r"n_seeds|steps"):
        load_or_train_target(config, tmp_path, QUIET)
    assert list(tmp_path.rglob("*.safetensors")) == []


def tms(make_config, diagonal):
    model = TMS(make_config("target.n_hidden=5").target, stream(0, "t", device=torch.device("cpu")))
    model.linear1.weight.data = torch.diag(torch.tensor(diagonal) ** 0.5)
    model.copy_tied_weight()
    return model


def test_missing_features(make_config):
    assert "[2, 3]" in tms_problem(tms(make_config, [1.0, 0.6, 0.4, 0.0, 1.0]))


def test_a_target_that_became_nan_misses_every_feature(make_config):
    assert "[0, 1, 2, 3, 4]" in tms_problem(tms(make_config, [float("nan")] * 5))


def test_training_lowers_the_loss_and_keeps_weights_tied(make_config):
    config = make_config()
    _, early = train_tms(make_config("target.steps=2").target, config.data, 0)
    model, late = train_tms(config.target, config.data, 0)
    assert late < early / 2
    assert torch.equal(model.linear2.weight, model.linear1.weight.T)
