"""The schema of a run: what a user may write, and what each field means.

Every model is frozen and forbids unknown keys; values stand in `spd_launch/conf/*.yaml`.
Importing this module never imports torch, so that planning a launch stays under a second.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

Seed = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class BaseConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScheduleConfig(BaseConfig):
    """A value over training: linear warm-up from 0, then `kind` from `start` to `end`."""

    kind: Literal["constant", "linear", "cosine"]
    start: float = Field(description="value after the warm-up")
    end: float = Field(description="value at the last step; equals start for kind=constant")
    warmup_fraction: Fraction = Field(description="share of all steps spent rising from 0 to start")

    @model_validator(mode="after")
    def _constant_has_one_value(self) -> Self:
        if self.kind == "constant" and self.start != self.end:
            raise ValueError(
                f"kind=constant needs start == end, got start={self.start} end={self.end}; "
                "use kind=linear or kind=cosine for a value that changes"
            )
        return self


# ---------------------------------------------------------------- target and data


class TMSTargetConfig(BaseConfig):
    """Toy model of superposition: x_hat = ReLU(W2 [H] W1 x + b), W2 = W1^T."""

    kind: Literal["tms"]
    n_features: Count
    n_hidden: Count
    init_bias_to_zero: bool
    batch_size: Count
    steps: Count
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    seed: Seed = Field(description="first seed to try; a target that misses a feature is retrained")
    n_seeds: Count = Field(description="how many seeds to try before giving up")


class SparseFeatureDataConfig(BaseConfig):
    """Each feature is U[0, 1) with the given probability, else 0."""

    kind: Literal["sparse_features"]
    feature_probability: Annotated[float, Field(gt=0, le=1)]
    generation: Literal["at_least_zero_active", "exactly_one_active"]


# ---------------------------------------------------------------- decomposition


class CiFnConfig(BaseConfig):
    """The causal-importance function of every module."""

    kind: Literal["mlp", "vector_mlp", "shared_mlp"]
    hidden: list[Count] = Field(min_length=1, description="hidden widths")


class DecomposeConfig(BaseConfig):
    modules: dict[str, Count] = Field(
        min_length=1, description="fnmatch pattern of module paths -> number of subcomponents C"
    )
    ci_fn: CiFnConfig
    sigmoid: Literal["leaky_hard", "normal", "hard", "swish_hard"]
    sampling: Literal["continuous", "binomial"]
    n_mask_samples: Count = Field(description="masks drawn per stochastic loss and step")
    delta_component: bool = Field(description="also mask the part of W that V U leaves out")
    tied: list[tuple[str, str]] = Field(
        description="pairs of module paths whose components start as each other's transpose"
    )
    distance: Literal["mse", "kl"] = Field(description="between target and masked output")


# ---------------------------------------------------------------- losses


class _LossConfig(BaseConfig):
    coeff: float | ScheduleConfig


class FaithfulnessConfig(_LossConfig):
    """Squared error between the target weights and the sum of subcomponents."""


class ImportanceMinimalityConfig(_LossConfig):
    p: Annotated[float, Field(gt=0)]
    beta: Annotated[float, Field(ge=0)] = Field(description="weight of the log2 frequency term")
    p_anneal_start_frac: Fraction
    p_anneal_end_frac: Fraction
    p_anneal_final_p: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _anneal_order(self) -> Self:
        if self.p_anneal_end_frac < self.p_anneal_start_frac:
            raise ValueError(
                f"p_anneal_end_frac={self.p_anneal_end_frac} lies before "
                f"p_anneal_start_frac={self.p_anneal_start_frac}"
            )
        return self


class ReconConfig(_LossConfig):
    """A reconstruction loss without options: its name says masks and routing."""


class UniformKSubsetConfig(BaseConfig):
    kind: Literal["uniform_k_subset"]


class StaticProbabilityConfig(BaseConfig):
    kind: Literal["static_probability"]
    p: Fraction = Field(description="probability that a module runs on its components")


class SubsetReconConfig(_LossConfig):
    routing: Annotated[UniformKSubsetConfig | StaticProbabilityConfig, Field(discriminator="kind")]


class LossesConfig(BaseConfig):
    """Losses by name; one that is absent (null) is not computed."""

    importance_minimality: ImportanceMinimalityConfig | None = None
    faithfulness: FaithfulnessConfig | None = None
    unmasked_recon: ReconConfig | None = None
    ci_masked_recon: ReconConfig | None = None
    ci_masked_recon_subset: SubsetReconConfig | None = None
    ci_masked_recon_layerwise: ReconConfig | None = None
    stochastic_recon: ReconConfig | None = None
    stochastic_recon_subset: SubsetReconConfig | None = None
    stochastic_recon_layerwise: ReconConfig | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not any(getattr(self, name) for name in type(self).model_fields):
            raise ValueError(f"at least one loss is needed: {', '.join(type(self).model_fields)}")
        return self


# ---------------------------------------------------------------- training


class WarmupConfig(BaseConfig):
    """Phase before training that fits V U to the target weights."""

    steps: Annotated[int, Field(ge=0)]
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]


class GradClipConfig(BaseConfig):
    """Largest global gradient norm; null does not clip."""

    components: Annotated[float, Field(gt=0)] | None
    ci_fns: Annotated[float, Field(gt=0)] | None


class TrainConfig(BaseConfig):
    steps: Count
    batch_size: Count = Field(description="global batch; dp divides it")
    lr: ScheduleConfig
    weight_decay: Annotated[float, Field(ge=0)]
    grad_clip: GradClipConfig
    faithfulness_warmup: WarmupConfig
    device: Literal["auto", "cpu", "cuda"] = Field(description="auto = cuda where there is one")


# ---------------------------------------------------------------- evaluation


class IdentityPattern(BaseConfig):
    """The known solution: an identity matrix over n features."""

    kind: Literal["identity"]
    n: Count


class DensePattern(BaseConfig):
    """The known solution: exactly k subcomponents active."""

    kind: Literal["dense"]
    k: Count


SolutionPattern = Annotated[IdentityPattern | DensePattern, Field(discriminator="kind")]


class MetricConfig(BaseConfig):
    when: Literal["fast", "slow"] = Field(description="at every eval, or only at the slow ones")


class PlainMetricConfig(MetricConfig):
    """A metric without options."""


class CiL0Config(MetricConfig):
    threshold: Fraction = Field(description="a subcomponent counts where its ci is above")


class DensityConfig(MetricConfig):
    threshold: Fraction


class IdentityCiErrorConfig(MetricConfig):
    tolerance: Fraction = Field(description="distance to 0 or 1 that still counts as right")
    modules: dict[str, SolutionPattern] = Field(min_length=1)


class MmcsMl2rConfig(MetricConfig):
    """Which side of each module's weight holds the features that are compared."""

    modules: dict[str, Literal["features_in", "features_out"]] = Field(min_length=1)


class MetricsConfig(BaseConfig):
    """Metrics by name; one that is absent (null) is not computed."""

    ci_l0: CiL0Config | None = None
    losses: PlainMetricConfig | None = None
    identity_ci_error: IdentityCiErrorConfig | None = None
    mmcs_ml2r: MmcsMl2rConfig | None = None
    ci_histograms: PlainMetricConfig | None = None
    component_activation_density: DensityConfig | None = None
    ci_mean_per_component: PlainMetricConfig | None = None
    permuted_ci_plots: PlainMetricConfig | None = None
    uv_plots: PlainMetricConfig | None = None


class EvalConfig(BaseConfig):
    every: Count = Field(description="steps between evaluations")
    slow_every: Count = Field(description="steps between slow ones; a multiple of every")
    steps: Count = Field(description="batches per evaluation")
    batch_size: Count
    metrics: MetricsConfig

    @model_validator(mode="after")
    def _slow_is_multiple(self) -> Self:
        if self.slow_every % self.every:
            raise ValueError(f"slow_every={self.slow_every} is no multiple of every={self.every}")
        return self


class CheckpointConfig(BaseConfig):
    every_steps: Count
    keep: Count = Field(description="newest checkpoints kept")


class WandbConfig(BaseConfig):
    mode: Literal["disabled", "online", "offline"]
    project: str
    entity: str | None
    group: str | None
    tags: list[str]


class TrackConfig(BaseConfig):
    log_every: Count = Field(description="steps between lines of metrics.jsonl")
    wandb: WandbConfig


# ---------------------------------------------------------------- where it runs


class ClusterConfig(BaseConfig):
    """A profile of `slurm_templates/`; `kind: local` runs in this process's machine."""

    kind: Literal["slurm", "local"]
    name: str
    gpus_per_node: Count = Field(description="tasks of one full node")
    nodes: Count | None = Field(description="null = as many as dp asks for")
    device: Literal["gpu", "cpu"] = Field(description="whether a task is given a GPU")
    cpus_per_task: Count = Field(description="cores, and CPU threads, of one rank")
    mem_per_task_gb: Annotated[float, Field(gt=0)] | None
    partition: str | None
    account: str | None
    qos: str | None
    time_min: Count
    signal_delay_s: Count = Field(description="warning before the time limit")
    requeue: Literal["on", "off"] = Field(description="continue by itself after a kill")
    env: dict[str, str] = Field(description="environment of every task")
    setup: str | None = Field(description="a shell file of slurm_templates/ sourced first")
    sbatch: dict[str, str | int | bool] = Field(description="further sbatch options")


class LaunchConfig(BaseConfig):
    out_dir: Path
    name: str | None = Field(description="name of the launch; null = the experiment's")
    dry_run: bool
    max_parallel: Count | None = Field(description="array tasks at one time; null = no limit")
    snapshot: Literal["copy", "off"]
    max_requeues: Annotated[int, Field(ge=0)]


class RunConfig(BaseConfig):
    """One run, as the user wrote it."""

    experiment: str
    seed: Seed
    dp: Count = Field(description="data-parallel processes")
    target: TMSTargetConfig
    data: SparseFeatureDataConfig
    decompose: DecomposeConfig
    losses: LossesConfig
    train: TrainConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    track: TrackConfig
    cluster: ClusterConfig
    launch: LaunchConfig

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.train.batch_size % self.dp:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} does not divide by dp={self.dp}"
            )
        if self.eval.batch_size % self.dp:
            raise ValueError(
                f"eval.batch_size={self.eval.batch_size} does not divide by dp={self.dp}"
            )
        return self


def load_config(path: Path) -> RunConfig:
    """Read and validate a run's config.yaml.

    Raises:
        ValueError: the file is missing or is not a valid run; the message names the file.
    """
    if not path.is_file():
        raise ValueError(f"no run config at {path}")
    return RunConfig.model_validate(yaml.safe_load(path.read_text()))


def config_to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_digest(config: BaseConfig) -> str:
    """Stable digest of a config: 16 hexadecimal digits of sha256 over its sorted JSON."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
