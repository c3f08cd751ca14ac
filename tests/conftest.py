"""Shared fixtures: the shipped config made small, run folders, and one store of trained targets."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from spd_core.config import RunConfig
from spd_core.run_dir import RunDir

REPO = Path(__file__).parent.parent
WHERE = ("cluster", "launch")  # what the core does not know of

settings.register_profile("fast", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("fast")

SMALL = (
    "target.steps=150",
    "target.batch_size=256",
    "target.lr={kind:constant,start:3e-2,end:3e-2,warmup_fraction:0.0}",
    "decompose.modules={linear1:6,linear2:6}",
    "decompose.ci_fn.hidden=[3]",
    "train.steps=6",
    "train.batch_size=32",
    "train.faithfulness_warmup.steps=3",
    "train.device=cpu",
    "eval.every=3",
    "eval.slow_every=6",
    "eval.steps=2",
    "eval.batch_size=32",
    "checkpoint.every_steps=2",
    "track.log_every=1",
)
# Drawing takes most of a small run's time, so it is on only where a test wants figures.
FIGURES = (
    "ci_histograms",
    "component_activation_density",
    "ci_mean_per_component",
    "permuted_ci_plots",
    "uv_plots",
)
NO_FIGURES = tuple(f"eval.metrics.{name}=null" for name in FIGURES)


@cache
def _compose(overrides: tuple[str, ...]) -> RunConfig:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    shipped = (f"hydra.searchpath=['file://{REPO}/slurm_templates']", "+experiment=tms_5-2")
    with initialize_config_dir(str(REPO / "spd_launch" / "conf"), version_base="1.3"):
        composed = compose("config", [*shipped, "cluster=local", *overrides])
    values: Any = OmegaConf.to_container(composed, resolve=True)
    return RunConfig.model_validate({k: v for k, v in values.items() if k not in WHERE})


@pytest.fixture
def shipped_config() -> RunConfig:
    """tms_5-2 exactly as it is shipped."""
    return _compose(())


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """tms_5-2, made small and without figures (`figures=True` keeps them), plus Hydra overrides."""

    def make(*overrides: str, figures: bool = False) -> RunConfig:
        return _compose((*SMALL, *(() if figures else NO_FIGURES), *overrides))

    return make


@pytest.fixture(scope="session")
def target_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("targets")


@pytest.fixture
def make_run_dir(tmp_path: Path, target_store: Path) -> Callable[[str], RunDir]:
    """A fresh run folder; all of them share one store of trained targets."""
    (tmp_path / "targets").symlink_to(target_store)

    def make(name: str) -> RunDir:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        return RunDir(folder)

    return make


@pytest.fixture
def one_process():
    import torch

    from spd_core.distributed import Dist

    return Dist(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture
def tms_model(make_config):
    """Components beside an untrained TMS with random biases (of the config, or of overrides)."""
    import torch

    from spd_core.component_model import ComponentModel
    from spd_core.randomness import stream
    from spd_core.targets.tms import TMS

    def make(*overrides: str) -> ComponentModel:
        config = make_config("target.init_bias_to_zero=false", *overrides)
        target = TMS(config.target, stream(1, "test", device=torch.device("cpu")))
        return ComponentModel(target, config.decompose, config.seed)

    return make
