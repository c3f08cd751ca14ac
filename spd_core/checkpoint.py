"""Checkpoints: a folder that appears whole or not at all, and that proves it is undamaged.

`checkpoints/step_N/` holds `state.safetensors` (weights and optimiser) and `meta.json` (the step
and the file's sha256). Random streams and schedules are functions of the step, so the step is all
of their state.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spd_core.component_model import ComponentModel
from spd_core.run_dir import RunDir


def save_checkpoint(
    run_dir: RunDir,
    step: int,
    model: ComponentModel,
    optimizer: torch.optim.Optimizer,
    extra: dict[str, Tensor],
    keep: int,
) -> None:
    """Write the state after `step` steps, then drop all but the newest `keep` checkpoints.

    `extra` is what else the loop needs to go on, by name.
    """
    run_dir.checkpoints.mkdir(exist_ok=True)
    folder = run_dir.checkpoints / f"step_{step}"
    temporary = Path(tempfile.mkdtemp(dir=run_dir.checkpoints, prefix=".step_"))
    state = temporary / "state.safetensors"
    save_file(_tensors(model, optimizer) | {f"extra:{n}": t for n, t in extra.items()}, state)
    meta = {"step": step, "sha256": _sha256(state)}
    (temporary / "meta.json").write_text(json.dumps(meta))
    for path in (state, temporary / "meta.json"):
        path.chmod(0o644)  # safetensors writes files that only their owner can read
        fsync(path)
    temporary.chmod(0o755)
    fsync(temporary)
    if folder.exists():
        set_aside(folder)
    os.rename(temporary, folder)
    fsync(run_dir.checkpoints)
    for old in checkpoint_steps(run_dir)[:-keep]:
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
    """The folder and step of the newest undamaged checkpoint, and the damaged ones with why.

    Raises:
        FileNotFoundError: there is none.
    """
    damaged: dict[Path, str] = {}
    for step in reversed(checkpoint_steps(run_dir)):
        folder = run_dir.checkpoints / f"step_{step}"
        problem = _damage(folder)
        if problem is None:
            return folder, step, damaged
        damaged[folder] = problem
    problems = ", ".join(damaged.values())
    raise FileNotFoundError(f"no valid checkpoint in {run_dir.checkpoints}: {problems}")


def load_model(folder: Path, model: ComponentModel) -> None:
    """Copy the trained parameters of a checkpoint into the model.

    Raises:
        ValueError: the checkpoint holds other parameters than the model.
    """
    _copy_parameters(folder, _read(folder), model)


def load_checkpoint(
    folder: Path, model: ComponentModel, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Copy a checkpoint into the model and the optimiser; returns what was saved as `extra`."""
    tensors = _read(folder)
    _copy_parameters(folder, tensors, model)
    for name, parameter in model.trained_parameters().items():
        prefix = f"optimizer:{name}:"
        optimizer.state[parameter] = {
            key.removeprefix(prefix): tensor.to(parameter.device)
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
    return {
        key.removeprefix("extra:"): tensor
        for key, tensor in tensors.items()
        if key.startswith("extra:")
    }


def _read(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / "state.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder}/state.safetensors holds no tensors: {error}") from None


@torch.no_grad()
def _copy_parameters(folder: Path, tensors: dict[str, Tensor], model: ComponentModel) -> None:
    saved = {n.removeprefix("model:"): t for n, t in tensors.items() if n.startswith("model:")}
    parameters = model.trained_parameters()
    shapes = {n: tuple(t.shape) for n, t in saved.items()}
    expected = {n: tuple(p.shape) for n, p in parameters.items()}
    if shapes != expected:
        wrong = sorted(n for n, _ in shapes.items() ^ expected.items())
        raise ValueError(
            f"{folder} does not fit the config beside it: {', '.join(dict.fromkeys(wrong))} "
            "missing, surplus, or of another shape"
        )
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


def _tensors(model: ComponentModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in model.trained_parameters().items():
        tensors[f"model:{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer:{name}:{key}"] = value
    return tensors


def _damage(folder: Path) -> str | None:
    meta_file, state = folder / "meta.json", folder / "state.safetensors"
    if not meta_file.exists() or not state.exists():
        return f"{folder} lacks a file"
    try:
        expected = json.loads(meta_file.read_text())["sha256"]
    except (json.JSONDecodeError, KeyError):
        return f"{meta_file} is damaged"
    return None if _sha256(state) == expected else f"{state} does not match its digest"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
