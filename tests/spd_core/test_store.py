import json
import subprocess
import sys

from rich.console import Console

from spd_core.config import config_digest
from spd_core.targets.store import TargetRecord, read_record, target_folder, target_name
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


def test_the_store_is_read_without_torch():
    code = "import sys, spd_core.targets.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
