"""Every target: built, trained once, checked, and kept in the target store."""

import fcntl
import importlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from spd_core import distributed
from spd_core.config import RunConfig
from spd_core.data.batches import token_data
from spd_core.data.documents import WITHOUT_HUB
from spd_core.distributed import Dist
from spd_core.randomness import stream
from spd_core.targets.config import (
    CustomTargetConfig,
    InductionDataConfig,
    InductionTargetConfig,
    ResidMLPTargetConfig,
    SparseFeatureDataConfig,
    TextDataConfig,
    TMSTargetConfig,
    TransformerTargetConfig,
)
from spd_core.targets.induction import InductionTransformer, induction_problem, train_induction
from spd_core.targets.keep import copy_from_run, different_fields, keep
from spd_core.targets.pretrain import Stopped, pretrain_on_text
from spd_core.targets.resid_mlp import ResidMLP, resid_mlp_problem, train_resid_mlp
from spd_core.targets.store import corpora, target_folder
from spd_core.targets.tms import TMS, tms_problem, train_tms
from spd_core.targets.transformer import build


@dataclass(frozen=True)
class Target:
    """What is decomposed; `output` selects the tensor to reconstruct, `seed` trained it."""

    module: nn.Module
    output: str | int | None
    seed: int | None


def load_or_train_target(config: RunConfig, store: Path, console: Console) -> Target:
    """The target of this config, from the store where it is.

    Raises:
        ValueError: no seed gave a good target, or a custom one cannot be loaded.
    """
    if isinstance(config.target, CustomTargetConfig):
        target = _load_custom(config.target)
        if isinstance(config.data, TextDataConfig):
            _check_vocabulary(target.module, config.data, corpora(store))
        return target
    here = Dist(0, 1, torch.device(_device(config)))
    train_target(config, store, here, console, lambda _: False)
    return load_target(config, store)


def train_target(
    config: RunConfig, store: Path, dist: Dist, console: Console, after_step: Callable[[int], bool]
) -> Literal["finished", "stopped"]:
    """Put the target of this config into the store, unless it is there; every rank calls this.

    Toy targets are trained alike on every rank, language models by all ranks together; these ask
    `after_step`, on every rank, with the steps done: where one answers True, all stop and have
    saved, and the next call goes on from there.

    Raises:
        ValueError: no seed gave a good target.
    """
    folder = target_folder(config, store)
    if distributed.any_rank(dist.is_main and folder.exists(), dist):
        return "finished"
    store.mkdir(parents=True, exist_ok=True)
    # Several jobs may ask for the same target at once: one trains it, the others wait here.
    with open(store / f"{folder.name}.lock", "w") as lock:
        try:
            _acquire(lock, dist, console, after_step)
            if distributed.any_rank(dist.is_main and not folder.exists(), dist):
                _train_into(config, folder, dist, console, after_step)
        except Stopped:
            return "stopped"
    return "finished"


def _acquire(lock: TextIO, dist: Dist, console: Console, after_step: Callable[[int], bool]) -> None:
    """Rank 0 locks for all; by asking again and again, since the others wait in a collective."""

    def locked() -> bool:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    waiting = False
    while not distributed.any_rank(dist.is_main and locked(), dist):
        if not waiting:
            console.print("another process is training this target: waiting for it")
        waiting = True
        if distributed.any_rank(after_step(0), dist):
            raise Stopped
        time.sleep(0.5)


def load_target(config: RunConfig, store: Path) -> Target:
    """A trained target.

    Raises:
        ValueError: the store has none of this config, or one that does not fit.
    """
    if isinstance(config.target, CustomTargetConfig):
        return _load_custom(config.target)
    folder = target_folder(config, store)
    if not folder.is_dir():
        raise ValueError(f"no target at {folder}: it was moved, or never trained")
    record = json.loads((folder / "target.json").read_text())
    if differences := different_fields(record["config"], config.target):
        raise ValueError(
            f"{folder} has the target of another config. There and here: {'; '.join(differences)}"
        )
    placeholder = stream(0, "placeholder", device=torch.device("cpu"))
    module = untrained_target(config, corpora(store), placeholder)
    try:
        load_model(module, folder / "target.safetensors")
    except (RuntimeError, SafetensorError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{folder} does not fit target and data: {problem}") from None
    return Target(module, None, record["seed"])


def untrained_target(config: RunConfig, data: Path, generator: torch.Generator) -> nn.Module:
    """A target of this config with random weights; `data` is the folder of tokenised corpora."""
    match config.target:
        case TMSTargetConfig():
            return TMS(config.target, generator)
        case ResidMLPTargetConfig():
            return ResidMLP(config.target, generator)
        case InductionTargetConfig():
            assert isinstance(config.data, InductionDataConfig)
            return InductionTransformer(config.target, config.data, generator)
        case TransformerTargetConfig():
            assert isinstance(config.data, TextDataConfig)
            n_tokens = token_data(config.data, data).vocab_size
            return build(config.target, n_tokens, config.data.seq_len, generator)
        case CustomTargetConfig():
            return _load_custom(config.target).module


def _train(
    config: RunConfig,
    seed: int,
    work: Path,
    dist: Dist,
    console: Console,
    after_step: Callable[[int], bool],
) -> tuple[nn.Module, float, str | None]:
    """A trained target, its loss, and what is wrong with it."""
    match config.target, config.data:
        case TMSTargetConfig(), SparseFeatureDataConfig():
            model, loss = train_tms(config.target, config.data, seed)
            return model, loss, tms_problem(model)
        case ResidMLPTargetConfig(), SparseFeatureDataConfig():
            model, loss = train_resid_mlp(config.target, config.data, seed)
            return model, loss, resid_mlp_problem(model)
        case InductionTargetConfig(), InductionDataConfig():
            model, loss = train_induction(config.target, config.data, seed)
            return model, loss, induction_problem(model, config.target, config.data)
        case TransformerTargetConfig(), TextDataConfig():
            data = token_data(config.data, corpora(work.parent))
            target = config.target.model_copy(update={"seed": seed})
            model, loss = pretrain_on_text(target, data, dist, work, console, after_step)
            return model.cpu(), loss, None
        case _:
            raise AssertionError(config.target.kind)


def _device(config: RunConfig) -> str:
    use_cuda = config.train.device != "cpu" and torch.cuda.is_available()
    return "cuda" if use_cuda else "cpu"


def _train_into(
    config: RunConfig, folder: Path, dist: Dist, console: Console, after_step: Callable[[int], bool]
) -> None:
    """Try one seed after the other until the target is good; or copy that of another run."""
    assert not isinstance(config.target, CustomTargetConfig)
    if config.target.from_run is not None:
        if dist.is_main:
            copy_from_run(config, config.target.from_run, folder)
        distributed.barrier(dist)
        console.print(f"took the target of {config.target.from_run}", soft_wrap=True)
        return
    first, n_seeds = config.target.seed, config.target.n_seeds
    work = folder.with_name(f".{folder.name}.pretrain")
    for seed in range(first, first + n_seeds):
        console.print(f"training the target (seed {seed}, {config.target.steps} steps)")
        module, loss, problem = _train(config, seed, work, dist, console, after_step)
        if problem is None:
            console.print(f"target trained with seed {seed}: loss {loss:.2e}")
            if dist.is_main:
                keep(config, module, seed, loss, folder)
                shutil.rmtree(work, ignore_errors=True)  # toy targets have none
            return
        console.print(f"target seed {seed} {problem}: next seed")
    raise ValueError(
        f"no target of seeds {first} to {first + n_seeds - 1} is good; "
        "raise target.n_seeds or target.steps"
    )


def load_class(class_path: str) -> Any:
    """What stands at an import path.

    Raises:
        ValueError: nothing, or it cannot be imported.
    """
    module_name, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"target.class_path={class_path}: {error}; it is found in the repository, in an "
            "installed package, or in a folder of PYTHONPATH"
        ) from None


def _load_custom(config: CustomTargetConfig) -> Target:
    """An importable module, with the weights that its own from_pretrained finds."""
    made = load_class(config.class_path)
    try:
        module = made() if config.pretrained is None else made.from_pretrained(config.pretrained)
    except (AttributeError, ImportError, OSError, TypeError, ValueError) as error:
        given = f"target.class_path={config.class_path}"
        advice = ""
        if config.pretrained is not None:
            given += f", target.pretrained={config.pretrained}"
            advice = f"; {WITHOUT_HUB['target.pretrained']}"
        raise ValueError(f"{given}: {' '.join(str(error).split())}{advice}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"target.class_path={config.class_path} makes no torch.nn.Module")
    # A cache of keys and values is of no use in one forward pass, and costs memory.
    settings: Any = getattr(module, "config", None)
    if hasattr(settings, "use_cache"):
        settings.use_cache = False
    return Target(module, config.output, None)


def _check_vocabulary(module: nn.Module, data: TextDataConfig, folder: Path) -> None:
    """Refuse tokens that a custom target has no embedding of."""
    find: Any = getattr(module, "get_input_embeddings", None)  # of transformers
    tables = [find()] if find is not None else module.modules()
    sizes = [table.num_embeddings for table in tables if isinstance(table, nn.Embedding)]
    n_tokens = token_data(data, folder).vocab_size
    if sizes and max(sizes) < n_tokens:
        raise ValueError(
            f"data.tokenizer={data.tokenizer} has {n_tokens} tokens (data.vocab_size="
            f"{data.vocab_size} where it is trained here), but the target embeds {max(sizes)}: "
            "take the target's own tokenizer"
        )
