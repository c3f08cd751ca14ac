"""Training a target once, checking that it is good, and keeping it in the target store."""

import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from spd_core.checkpoint import fsync
from spd_core.config import RunConfig, SparseFeatureDataConfig, TMSTargetConfig, config_digest
from spd_core.data.sparse import sparse_features
from spd_core.randomness import StepRandomness, stream
from spd_core.targets.tms import TMS


def load_or_train_target(config: RunConfig, store: Path, console: Console) -> tuple[TMS, int]:
    """The target of this config and the seed it was trained with, from the store where it is.

    Raises:
        ValueError: no seed gave a target that represents every feature.
    """
    folder = target_folder(config, store)
    store.mkdir(parents=True, exist_ok=True)
    # Several tasks may ask for the same target at once: one trains it, the others wait here.
    with open(store / f"{folder.name}.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _train_into(config, folder, console)
    return load_target(config, store)


def target_folder(config: RunConfig, store: Path) -> Path:
    return store / (config_digest(config.target)[:8] + config_digest(config.data)[:8])


def load_target(config: RunConfig, store: Path) -> tuple[TMS, int]:
    """A trained target and its seed.

    Raises:
        ValueError: the store has none of this config.
    """
    folder = target_folder(config, store)
    if not folder.is_dir():
        raise ValueError(f"no target at {folder}: it was moved, or never trained")
    model = TMS(config.target, stream(0, "placeholder", device=torch.device("cpu")))
    model.load_state_dict(load_file(folder / "target.safetensors"))
    return model, json.loads((folder / "target.json").read_text())["seed"]


def _train_into(config: RunConfig, folder: Path, console: Console) -> None:
    model, seed, loss = _train_good_target(config.target, config.data, console)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        save_file(model.state_dict(), temporary / "target.safetensors")
        record = {"seed": seed, "loss": loss, "config": config.target.model_dump(mode="json")}
        (temporary / "target.json").write_text(json.dumps(record, indent=2))
        for path in (*temporary.iterdir(), temporary):
            fsync(path)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _train_good_target(
    config: TMSTargetConfig, data: SparseFeatureDataConfig, console: Console
) -> tuple[TMS, int, float]:
    for seed in range(config.seed, config.seed + config.n_seeds):
        with console.status(f"training the target (seed {seed}, {config.steps} steps)"):
            model, loss = train_tms(config, data, seed)
        missing = missing_features(model)
        if not missing:
            console.print(f"target trained with seed {seed}: loss {loss:.2e}")
            return model, seed, loss
        console.print(f"target seed {seed} does not represent features {missing}: next seed")
    raise ValueError(
        f"no target of seeds {config.seed} to {config.seed + config.n_seeds - 1} represents every "
        "feature; raise target.n_seeds or target.steps"
    )


def train_tms(
    config: TMSTargetConfig, data: SparseFeatureDataConfig, seed: int
) -> tuple[TMS, float]:
    """Train with AdamW on the mean squared error; returns the model and its mean last loss."""
    cpu = torch.device("cpu")
    model = TMS(config, stream(seed, "target_init", device=cpu))
    # The transpose of one weight serves both layers while training; linear2's copy follows.
    weight, bias = model.linear1.weight, model.linear2.bias
    optimizer = torch.optim.AdamW(
        [weight, bias], lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    losses: list[Float[Tensor, ""]] = []
    for step in range(config.steps):
        randomness = StepRandomness(seed, step, 0, 1, config.batch_size, cpu)
        x = sparse_features(data, config.n_features, randomness.batch_stream("target_data"))
        out = (x @ weight.T @ weight + bias).relu()
        loss = (out - x).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    model.copy_tied_weight()
    return model, torch.stack(losses[-100:]).mean().item()


@torch.no_grad()
def missing_features(model: TMS) -> list[int]:
    """Features that do not survive: a single feature at 1 must come out above 1/2; NaN does not."""
    out = model(torch.eye(model.n_features))
    return [i for i in range(model.n_features) if not out[i, i] >= 0.5]
