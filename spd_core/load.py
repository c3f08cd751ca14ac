"""A run back in memory: config, target and decomposition, from wherever it lies."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from spd_core.checkpoint import load_model, newest_valid_checkpoint
from spd_core.component_model import ComponentModel
from spd_core.config import RunConfig, load_config, named_run
from spd_core.run_dir import RunDir
from spd_core.targets.train_target import load_target

WANDB = re.compile(  # behind a run's URL may stand the tab that was open, and more
    r"(?:wandb:)?(https?://[^/]+/)?([\w.-]+/[\w.-]+)(?:/runs)?/"
    r"(?!(?:sweeps|reports|workspace|table)(?:[/?#]|$))([\w.-]+)/?(?(1)(?:[/?#].*)?)"
)


@dataclass(frozen=True)
class LoadedRun:
    """A decomposition after `step` steps; `model.target` is what was decomposed."""

    config: RunConfig
    model: ComponentModel
    step: int


def load_run(reference: str | Path) -> LoadedRun:
    """Load the newest checkpoint of a run, on the CPU.

    `reference` is the folder of a run; its id in $SPD_OUT_DIR (else ./outputs); its name in
    runs.yaml; or a run of W&B: `entity/project/id`, also after `wandb:`, or its URL.
    Nothing in a run's files is executed: weights are safetensors, checked against their digest.

    Raises:
        ValueError: the reference is none of these, or the config or target does not fit.
        FileNotFoundError: the run has no undamaged checkpoint.
    """
    run_dir = find_run(str(reference))
    config = load_config(run_dir.config_file)
    target = load_target(config, run_dir.targets)
    model = ComponentModel(target.module, config.decompose, config.seed, target.output)
    folder, step, _ = newest_valid_checkpoint(run_dir)
    load_model(folder, model)
    return LoadedRun(config, model, step)


def find_run(reference: str) -> RunDir:
    """The run's folder; a run of W&B is downloaded first, into the folder of outputs."""
    reference, outputs = named_run(reference), Path(os.environ.get("SPD_OUT_DIR", "outputs"))
    for folder in (Path(reference), outputs / "runs" / reference):
        if (folder / "config.yaml").is_file():
            return RunDir(folder.absolute())
    if match := WANDB.fullmatch(reference):
        return _download(match[2], match[3], outputs / "wandb")
    raise ValueError(
        f"no run {reference!r}: no name in runs.yaml, no folder with a config.yaml, no run id in "
        f"{outputs.absolute() / 'runs'} (see SPD_OUT_DIR), and no entity/project/id or URL of W&B"
    )


def _download(project: str, run_id: str, folder: Path) -> RunDir:
    """Fetch what `spd_launch.upload` sent of a finished run."""
    import wandb  # takes seconds, and few runs come from there

    try:
        for file in wandb.Api(timeout=30).run(f"{project}/{run_id}").files():
            if file.name.startswith(("runs/", "targets/")):
                file.download(root=str(folder.absolute()), exist_ok=True)
    except (wandb.Error, OSError) as error:
        raise ValueError(f"no {project}/{run_id} from W&B: {error}; `wandb login`?") from None
    return RunDir(folder.absolute() / "runs" / run_id)
