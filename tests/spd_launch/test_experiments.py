"""Every shipped experiment is valid, and what the launcher knows of its target is true."""

from pathlib import Path

import pytest
import torch

from spd_core.component_model import expand_patterns
from spd_core.components import is_decomposable
from spd_core.targets.train_target import untrained_target
from spd_core.targets.transformer import build
from spd_launch.compose import compose, experiment_names
from spd_launch.validate import known_modules, validate

CUSTOM = ["target.class_path=torch.nn.Linear", "decompose.modules={h: 3}"]


def config_of(name, *overrides):
    arguments = [f"+experiment={name}", "cluster=local", *overrides]
    if name == "custom":
        arguments += CUSTOM
    return validate(compose(arguments, multirun=False)[0].values)


def target_of(config):
    generator = torch.Generator().manual_seed(0)
    if config.data.kind == "text":
        return build(config.target, config.data.vocab_size, config.data.seq_len, generator)
    return untrained_target(config, Path("unused"), generator)


OWN = [n for n in experiment_names() if n not in ("custom", "gpt2", "ss_gpt2", "ts")]


@pytest.mark.parametrize("name", experiment_names())
def test_it_is_valid_and_named_as_its_file(name):
    assert config_of(name).experiment == name


@pytest.mark.parametrize("name", OWN)
def test_the_launcher_knows_the_modules_without_building_the_target(name):
    config = config_of(name)
    target = target_of(config)
    modules = [path for path, module in target.named_modules() if is_decomposable(module)]
    assert sorted(m for m in modules if m != "wpe") == sorted(
        m for m in known_modules(config.target) if m in modules
    )
    assert set(known_modules(config.target)) <= set(modules)
    chosen = expand_patterns(target, config.decompose.modules, "decompose.modules")
    assert chosen.keys() <= set(known_modules(config.target))


@pytest.mark.parametrize("name", [n for n in OWN if n.startswith("ss_")])
def test_language_models_run_small_on_stories(name):
    small, full = config_of(name, "data=stories", "size=small"), config_of(name)
    assert small.data.source == "stories" and full.data.source == "hub"
    assert small.train.steps < full.train.steps and small.target.kind == full.target.kind
    in_full = expand_patterns(target_of(full), full.decompose.modules, "decompose.modules")
    in_small = expand_patterns(target_of(small), small.decompose.modules, "decompose.modules")
    assert in_small == dict.fromkeys(in_full, 200)
