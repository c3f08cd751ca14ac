"""How a target gets into the store: trained here, or copied from another run."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from spd_core.base_config import BaseConfig
from spd_core.config import RunConfig, load_config
from spd_core.run_dir import RunDir, written_whole
from spd_core.targets.config import DataConfig, SparseFeatureDataConfig, TextDataConfig
from spd_core.targets.store import target_folder

HOW_TRAINED = {
    "from_run", "batch_size", "steps", "lr", "weight_decay", "seed", "n_seeds", "grad_clip",
    "autocast", "init_bias_to_zero", "accuracy",
}  # fmt: skip
"""Fields of a target that do not say what it computes."""


def keep(config: RunConfig, module: nn.Module, seed: int, loss: float, folder: Path) -> None:
    """Put a trained target into the store."""
    record = {"seed": seed, "loss": loss, "config": config.target.model_dump(mode="json")}
    with written_whole(folder) as new:
        new.mkdir()
        save_model(module, str(new / "target.safetensors"))
        (new / "target.json").write_text(json.dumps(record, indent=2))


def copy_from_run(config: RunConfig, reference: str, folder: Path) -> None:
    """Put the target of another run into the store, as this config's target.

    Raises:
        ValueError: there is no such run, it has no trained target, or one that does not fit.
    """
    run_dir = _find(reference, folder.parent.parent)
    other = load_config(run_dir.config_file)
    if other.target.kind == "custom":
        raise ValueError(
            f"target.from_run={reference}: that target was not trained here but loaded: use "
            "target=custom with its target.class_path and target.pretrained"
        )
    differences = different_fields(other.target.model_dump(mode="json"), config.target)
    if not differences:  # otherwise its data may be of another kind
        differences = _different_data(other.data, config.data)
    if differences:
        raise ValueError(
            f"target.from_run={reference}: its target does not fit. There and here: "
            f"{'; '.join(differences)}"
        )
    source = target_folder(other, run_dir.targets)
    if not source.is_dir():
        raise ValueError(f"target.from_run={reference} has no trained target yet, {source}")
    record = json.loads((source / "target.json").read_text()) | {"from_run": reference}
    with written_whole(folder) as new:
        new.mkdir()
        shutil.copy(source / "target.safetensors", new)
        (new / "target.json").write_text(json.dumps(record, indent=2))


def different_fields(there: dict[str, Any], here: BaseConfig) -> list[str]:
    """What another target computes differently: `target.NAME=THERE and HERE` for each field."""
    fields = here.model_dump(mode="json")
    if there["kind"] != fields["kind"]:
        return [f"target.kind={there['kind']} and {fields['kind']}"]
    names = [name for name in fields if name not in HOW_TRAINED and there[name] != fields[name]]
    return [f"target.{name}={there[name]} and {fields[name]}" for name in names]


def _different_data(there: DataConfig, here: DataConfig) -> list[str]:
    """What of the data a target depends on: where one is learned, all that makes a tokenizer."""
    match here:
        case SparseFeatureDataConfig():
            names = []
        case TextDataConfig(tokenizer=str()):
            names = ["tokenizer", "seq_len"]
        case _:
            names = list(type(here).model_fields)
    pairs = [(name, getattr(there, name), getattr(here, name)) for name in names]
    return [f"data.{name}={a} and {b}" for name, a, b in pairs if a != b]


def _find(reference: str, out_dir: Path) -> RunDir:
    from spd_core.load import find_run  # it imports what imports this file

    own = RunDir(out_dir / "runs" / reference)
    return own if own.config_file.is_file() else find_run(reference)
