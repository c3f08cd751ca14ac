"""The schema of a run: what a user may write, and what each field means.

Every model is frozen and forbids unknown keys; values stand in `spd_launch/conf/*.yaml`.
Importing this module never imports torch, so that planning a launch stays under a second.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from spd_core.base_config import BaseConfig, Count, CustomConfig, Positive, ScheduleConfig, Seed
from spd_core.config.losses import LossesConfig
from spd_core.config.metrics import DATA_OF, MetricsConfig
from spd_core.targets.config import DataConfig, TargetConfig, data_kind_of


class CiFnConfig(BaseConfig):
    """The causal-importance function of every module."""

    kind: Literal["mlp", "vector_mlp", "shared_mlp"]
    hidden: list[Count] = Field(min_length=1, description="hidden widths")


class CustomCiFnConfig(CustomConfig):
    """A causal-importance function of the user's own."""

    kind: Literal["custom"]


Sigmoid = Literal["leaky_hard", "normal", "hard", "swish_hard"]
Checkpointing = Literal["off", "ci_fns"]
AnyCiFnConfig = Annotated[CiFnConfig | CustomCiFnConfig, Field(discriminator="kind")]


class DecomposeConfig(BaseConfig):
    """C is a number of subcomponents; a pattern, one of fnmatch for module paths."""

    modules: dict[str, Count | None] = Field(description="pattern -> C; null = not these")
    identity_modules: dict[str, Count] = Field(description="pattern -> C of PATH.pre_identity")
    ci_fn: AnyCiFnConfig
    sigmoid: Sigmoid
    sampling: Literal["continuous", "binomial"]
    n_mask_samples: Count = Field(description="masks drawn per stochastic loss and step")
    delta_component: bool = Field(description="also mask the part of W that V U leaves out")
    start: Literal["random", "examples"] = Field(description="examples = V reads single inputs")
    tied: list[tuple[str, str]] = Field(description="paths that start as each other's transpose")
    distance: Literal["mse", "kl"] = Field(description="between target and masked output")


class WarmupConfig(BaseConfig):
    """Phase before training that fits V U to the target weights."""

    steps: Annotated[int, Field(ge=0)]
    lr: Positive
    weight_decay: Annotated[float, Field(ge=0)]


class GradClipConfig(BaseConfig):
    """Largest global gradient norm; null does not clip."""

    components: Positive | None
    ci_fns: Positive | None


class TrainConfig(BaseConfig):
    steps: Count
    batch_size: Count = Field(description="global batch; dp divides it")
    microbatch_size: Count | None = Field(description="of one rank per forward pass; null = all")
    lr: ScheduleConfig
    weight_decay: Annotated[float, Field(ge=0)]
    grad_clip: GradClipConfig
    faithfulness_warmup: WarmupConfig
    on_nan: Literal["stop", "rewind"] = Field(description="rewind = go back, take other batches")
    autocast: Literal["off", "bf16"] = Field(description="precision of the forward passes")
    activation_checkpointing: Checkpointing = Field(description="what is not kept but made twice")
    device: Literal["auto", "cpu", "cuda"] = Field(description="auto = cuda where there is one")
    compile: Literal["off", "default", "max"] = Field(description="on a GPU; max = a CUDA graph")


class EvalConfig(BaseConfig):
    every: Count = Field(description="steps between evaluations")
    slow_every: Count = Field(description="steps between slow ones")
    steps: Count = Field(description="batches per evaluation")
    batch_size: Count
    metrics: MetricsConfig


class CheckpointConfig(BaseConfig):
    every_steps: Count
    keep: Count = Field(description="newest checkpoints kept")
    keep_every: Count | None = Field(description="those of multiples of so many steps stay too")


class WandbConfig(BaseConfig):
    mode: Literal["disabled", "online", "offline"]
    project: str
    entity: str | None
    group: str | None
    tags: list[str]


class TrackConfig(BaseConfig):
    log_every: Count = Field(description="steps between lines of metrics.jsonl")
    wandb: WandbConfig


class RunConfig(BaseConfig):
    """What one run trains, and how; nothing of where it runs."""

    experiment: str
    seed: Seed
    dp: Count = Field(description="data-parallel processes")
    target: TargetConfig
    data: DataConfig
    decompose: DecomposeConfig
    losses: LossesConfig
    train: TrainConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    track: TrackConfig

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        takes = {f"target.kind={self.target.kind}": data_kind_of(self.target)}
        metrics = self.eval.metrics.configured()
        takes |= {f"eval.metrics.{n}": kind for n, kind in DATA_OF.items() if n in metrics}
        for part, kind in takes.items():
            if kind not in (None, self.data.kind):
                off = f"; {part}=null leaves it out" if part.startswith("eval") else ""
                misfit = f"data.kind={self.data.kind} does not fit {part}, which takes {kind}"
                raise ValueError(misfit + off)
        dp, batch, micro = self.dp, self.train.batch_size, self.train.microbatch_size
        if batch % dp:
            raise ValueError(f"train.batch_size={batch} does not divide by dp={dp}")
        if micro is not None and batch // dp % micro:
            raise ValueError(
                f"train.microbatch_size={micro} does not divide a rank's {batch // dp} examples"
            )
        if self.eval.batch_size < dp:
            raise ValueError(
                f"eval.batch_size={self.eval.batch_size} leaves some of dp={dp} ranks empty"
            )
        return self


def load_config(path: Path) -> RunConfig:
    """Read and validate a run's config.yaml; a ValueError names the file."""
    if not path.is_file():
        raise ValueError(f"no run config at {path}")
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return RunConfig.model_validate(yaml.load(path.read_text(), loader))
    except (ValidationError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no valid run config: {error}") from None


def named_run(reference: str) -> str:
    """What runs.yaml, here or else in the repository, says for this name; else the reference."""
    for file in (Path.cwd() / "runs.yaml", Path(__file__).parents[2] / "runs.yaml"):
        try:
            names = dict(yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is no list of NAME: RUN lines: {error}") from None
        if reference in names:
            folder = file.parent / str(names[reference])  # a path in it starts where it lies
            return str(folder if folder.exists() else names[reference])
    return reference


def config_digest(config: BaseConfig) -> str:
    """Stable digest of a config: 16 hexadecimal digits of sha256 over its sorted JSON."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
