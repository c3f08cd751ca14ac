"""Checkpoints: a folder that appears whole or not at all, and that proves it is undamaged.

`checkpoints/step_N/` holds `state.safetensors` (weights and optimiser) and `meta.json` (the step
and the file's sha256). Random streams and schedules are functions of the step, so the step is all
of their state. Every rank has the same state, so rank 0 alone writes it.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from spd_core.component_model import ComponentModel
from spd_core.config import CheckpointConfig
from spd_core.run_dir import RunDir, sync, written_whole

FORMAT = "1"  # of the tensors' names and meanings; raised when an older state cannot be continued


def training_state(
    model: ComponentModel, optimizer: torch.optim.Optimizer, extra: dict[str, Tensor]
) -> dict[str, Tensor]:
    """All that training needs to go on, copied to the host; `extra` is added by name."""
    tensors = {f"extra:{name}": tensor for name, tensor in extra.items()}
    for name, parameter in model.trained_parameters().items():
        tensors[f"model:{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer:{name}:{key}"] = value
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def save_checkpoint(
    run_dir: RunDir, step: int, state: dict[str, Tensor], options: CheckpointConfig
) -> None:
    """Write the `training_state` after `step` steps, then drop old ones."""
    sync(run_dir.metrics_file)  # no later attempt writes its lines again
    folder = run_dir.checkpoints / f"step_{step}"
    if folder.exists():
        set_aside(folder)
    with written_whole(folder) as new:
        new.mkdir(parents=True)
        save_file(state, new / "state.safetensors", {"format": FORMAT})
        meta = {"step": step, "sha256": _sha256(new / "state.safetensors")}
        (new / "meta.json").write_text(json.dumps(meta))
    drop_old(run_dir, step, options)


def drop_old(run_dir: RunDir, step: int, options: CheckpointConfig) -> None:
    """Remove what is not to be kept once `step` is the newest, and what kills left of others."""
    # Where a run was stopped is no reason to drop a planned one: rewinds go there.
    due = [s for s in checkpoint_steps(run_dir) if s % options.every_steps == 0 or s == step]
    for old in {*checkpoint_steps(run_dir)} - {*due[-options.keep :]}:
        if options.keep_every is None or old % options.keep_every:
            shutil.rmtree(run_dir.checkpoints / f"step_{old}")
    for leftover in run_dir.checkpoints.glob(".step_*"):
        shutil.rmtree(leftover)


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that it is neither loaded nor counted among the kept."""
    aside = folder.with_name(f"damaged_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)


def checkpoint_steps(run_dir: RunDir) -> list[int]:
    """Steps that have a checkpoint folder, oldest first."""
    return sorted(int(p.name.removeprefix("step_")) for p in run_dir.checkpoints.glob("step_*"))


def newest_valid_checkpoint(run_dir: RunDir) -> tuple[Path, int, dict[Path, str]]:
    """`newest_valid_step` with its folder; FileNotFoundError without one."""
    step, damaged = newest_valid_step(run_dir)
    if step == 0:
        problems = ", ".join(damaged.values())
        raise FileNotFoundError(f"no valid checkpoint in {run_dir.checkpoints}: {problems}")
    return run_dir.checkpoints / f"step_{step}", step, damaged


def newest_valid_step(run_dir: RunDir) -> tuple[int, dict[Path, str]]:
    """The step of the newest undamaged checkpoint (0: none), and why newer ones are damaged."""
    damaged: dict[Path, str] = {}
    for step in reversed(checkpoint_steps(run_dir)):
        folder = run_dir.checkpoints / f"step_{step}"
        try:
            digest = json.loads((folder / "meta.json").read_text())["sha256"]
            if digest == _sha256(folder / "state.safetensors"):
                return step, damaged
            damaged[folder] = f"{folder}/state.safetensors does not match its digest"
        except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
            damaged[folder] = f"{folder} is damaged: {error}"
    return 0, damaged


@torch.no_grad()
def load_model(folder: Path, model: ComponentModel) -> dict[str, Tensor]:
    """Copy the trained parameters of a checkpoint into the model; returns all of its tensors.

    Raises:
        ValueError: the checkpoint is of another format, or has other parameters than the model.
    """
    try:
        with safe_open(folder / "state.safetensors", "pt") as file:
            made = (file.metadata() or {"format": "1"})["format"]
        tensors = load_file(folder / "state.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder}/state.safetensors holds no tensors: {error}") from None
    if made != FORMAT:
        raise ValueError(
            f"{folder} has format {made}, and this code reads format {FORMAT}: "
            "continue with the code that wrote it, as `resume` does"
        )
    saved, parameters = _below("model:", tensors), model.trained_parameters()
    shapes, wanted = ({(n, t.shape) for n, t in of.items()} for of in (saved, parameters))
    if wrong := {name for name, _ in shapes ^ wanted}:
        raise ValueError(
            f"{folder} does not fit the config beside it: {', '.join(sorted(wrong))} "
            "missing, surplus, or of another shape"
        )
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])
    return tensors


def load_checkpoint(
    folder: Path, model: ComponentModel, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Copy a checkpoint into the model and the optimiser; returns what was saved as `extra`."""
    tensors = load_model(folder, model)
    for name, parameter in model.trained_parameters().items():
        state = _below(f"optimizer:{name}:", tensors)
        optimizer.state[parameter] = {k: t.to(parameter.device) for k, t in state.items()}
    return _below("extra:", tensors)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
