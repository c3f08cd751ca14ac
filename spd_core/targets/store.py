"""The target store: a folder for each trained target, named by its config. Loads no torch.

targets/NAME/   target.safetensors   target.json (seed, loss, config)
"""

import json
from dataclasses import dataclass
from pathlib import Path

from spd_core.config import RunConfig, config_digest


@dataclass(frozen=True)
class TargetRecord:
    """What is known of a trained target: the seed that gave it, and its loss."""

    seed: int
    loss: float


def target_name(config: RunConfig) -> str:
    """The same for all runs that decompose one target: 16 hexadecimal digits."""
    return config_digest(config.target)[:8] + config_digest(config.data)[:8]


def target_folder(config: RunConfig, store: Path) -> Path:
    return store / target_name(config)


def corpora(store: Path) -> Path:
    """The folder of tokenised corpora, which lies beside the target store."""
    return store.parent / "data"


def read_record(config: RunConfig, store: Path) -> TargetRecord | None:
    """The record of this config's target; None while it is not trained, and for a custom one."""
    file = target_folder(config, store) / "target.json"
    if not file.is_file():
        return None
    record = json.loads(file.read_text())
    return TargetRecord(record["seed"], record["loss"])


def describe_target(config: RunConfig, store: Path) -> str:
    """What is decomposed, which seed gave it, and its loss, in words."""
    target, record = config.target, read_record(config, store)
    if target.kind == "custom":
        return target.class_path + (f" of {target.pretrained}" if target.pretrained else "")
    if record is None:
        return f"{target.kind}, not trained yet"
    match target.kind:
        case "tms" | "resid_mlp":
            loss = f"mean squared error {record.loss:.2e}"
        case "induction":
            loss = f"loss {record.loss:.3f} nats"
        case "llama_simple" | "llama_simple_mlp" | "gpt2_simple" | "gpt2_simple_noln":
            loss = f"validation loss {record.loss:.3f} nats"
    return f"{target.kind} of seed {record.seed}, {loss}"
