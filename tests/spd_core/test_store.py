import json
import subprocess
import sys

from rich.console import Console
from test_keep import text_run
from test_transformer import make_target_config

from spd_core.config import RunConfig, config_digest
from spd_core.targets.store import (
    TargetRecord,
    describe_target,
    read_record,
    target_folder,
    target_name,
)
from spd_core.targets.train_target import load_or_train_target


def test_the_name_is_that_of_target_and_data_alone(make_config, tmp_path):
    config = make_config()
    name = target_name(config)
    assert name == config_digest(config.target)[:8] + config_digest(config.data)[:8]
    assert target_name(make_config("seed=3", "train.steps=7", "dp=2")) == name
    assert target_name(make_config("target.seed=3")) != name
    assert target_name(make_config("data.feature_probability=0.3")) != name
    assert target_folder(config, tmp_path) == tmp_path / name


def test_the_record_of_a_target_says_its_seed_and_loss(make_config, tmp_path):
    config = make_config()
    assert read_record(config, tmp_path) is None
    seed = load_or_train_target(config, tmp_path, Console(quiet=True)).seed
    [file] = tmp_path.glob("*/target.json")
    loss = json.loads(file.read_text())["loss"]
    assert read_record(config, tmp_path) == TargetRecord(seed, loss) and 0 < loss < 0.1


def test_a_target_in_words(make_config, tmp_path):
    config, out_dir = make_config(), tmp_path / "targets"
    assert describe_target(config, out_dir) == "tms, not trained yet"
    text = text_run(make_config, make_target_config(kind="gpt2_simple"))
    for run, seed, loss in ((config, 3, 0.00321), (text, 0, 1.23456)):
        folder = target_folder(run, out_dir)
        folder.mkdir(parents=True)
        (folder / "target.json").write_text(json.dumps({"seed": seed, "loss": loss}))
    assert describe_target(config, out_dir) == "tms of seed 3, mean squared error 3.21e-03"
    wanted = "gpt2_simple of seed 0, validation loss 1.235 nats"
    assert describe_target(text, out_dir) == wanted
    custom = {"kind": "custom", "class_path": "torch.nn.Linear", "pretrained": None}
    custom |= {"n_features": None, "output": None}
    for name, words in ((None, "torch.nn.Linear"), ("a/b", "torch.nn.Linear of a/b")):
        values = config.model_dump() | {"target": custom | {"pretrained": name}}
        assert describe_target(RunConfig.model_validate(values), out_dir) == words


def test_the_store_is_read_without_torch():
    code = "import sys, spd_core.targets.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
