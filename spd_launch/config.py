"""The schema of what a user composes: a run, with where and how it is launched. Loads no torch."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from spd_core.base_config import BaseConfig, Count, Positive
from spd_core.config import RunConfig, WandbConfig, config_digest

# These go into a shell script: a line's end would end the quoted word that they are there.
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f]*$")]
Option = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class ClusterConfig(BaseConfig):
    """A profile of `slurm_templates/`; `kind: local` runs in this process's machine."""

    kind: Literal["slurm", "local"]
    name: str
    gpus_per_node: Count = Field(description="tasks of one full node")
    nodes: Count | None = Field(description="null = as many as dp asks for")
    device: Literal["gpu", "cpu"] = Field(description="whether a task is given a GPU")
    cpus_per_task: Count = Field(description="cores, and CPU threads, of one rank")
    mem_per_task_gb: Positive | None
    partition: Line | None
    account: Line | None
    qos: Line | None
    time_min: Count
    signal_delay_s: Count = Field(description="warning before the time limit")
    requeue: Literal["on", "off"] = Field(description="continue by itself after a kill")
    env: dict[Variable, str] = Field(description="environment of every task")
    setup: Line | None = Field(description="a shell file of slurm_templates/ sourced first")
    sbatch: dict[Option, Line | int | bool] = Field(description="further sbatch options")


class PartsConfig(BaseConfig):
    """A step that is several tasks for each run."""

    n: Count = Field(description="members of an ensemble (seeds 0 to n - 1), or shards")
    name: str = Field(pattern=r"^\w[\w.-]*$", description="of the results, in the run's folder")
    options: list[str] = Field(description="FIELD=VALUE of the command, such as alpha=0.5")


class EvaluateConfig(BaseConfig):
    """Of the step evaluate."""

    checkpoints: Literal["last", "all"]
    steps: Count | None = Field(description="batches of data; null = the run's eval.steps")
    batch_size: Count | None = Field(description="null = the run's eval.batch_size")


class LaunchConfig(BaseConfig):
    out_dir: Path
    name: str | None = Field(description="name of the launch; null = the sweep's or experiment's")
    goal: Literal["decomposition", "target"] = Field(
        description="target = only put the target into the store, where runs find it"
    )
    dry_run: bool
    wait: bool = Field(description="come back when all is over, with code 1 if a run failed")
    max_parallel: Count | None = Field(description="array tasks at one time; null = no limit")
    pack: Count = Field(description="runs that share one array task, and what that is given")
    snapshot: Literal["copy", "commit", "off"] = Field(
        description="copy = run from a copy; commit = only keep it in git; off = neither"
    )
    snapshot_max_mb: Positive = Field(description="larger untracked files are left out")
    snapshot_push_to: str | None = Field(description="a git remote that gets the snapshot too")
    if_done: Literal["auto", "skip", "rerun", "ask"] = Field(
        description="what to do with a run that has finished before; auto = skip in sweeps"
    )
    max_requeues: Annotated[int, Field(ge=0)]
    then: list[str] = Field(description="steps that follow the runs, in this order")
    then_needs: Literal["all", "any"] = Field(description="runs that steps of the launch need")
    evaluate: EvaluateConfig
    clustering: PartsConfig = Field(description="of the steps clustering, cluster_distances")
    harvest: PartsConfig = Field(description="of the steps harvest, merge_harvest")

    def parts(self) -> dict[str, dict[str, Any]]:
        """What steps are given (`spd_launch.steps`), as plain data."""
        words = ["--all-steps"] if self.evaluate.checkpoints == "all" else []
        sizes = {"--steps": self.evaluate.steps, "--batch-size": self.evaluate.batch_size}
        words += [f"{option}={value}" for option, value in sizes.items() if value is not None]
        parts = {name: getattr(self, name).model_dump() for name in ("clustering", "harvest")}
        return {"evaluate": {"options": words}, **parts}


class JobConfig(RunConfig):
    """One run as the user wrote it: what is trained, and where and how."""

    cluster: ClusterConfig
    launch: LaunchConfig

    @model_validator(mode="after")
    def _packed_runs_are_of_one_process(self) -> Self:
        if self.launch.pack > 1 and self.dp > 1:
            raise ValueError(
                f"launch.pack={self.launch.pack} with dp={self.dp}: runs that share a GPU or node "
                "are of one process each; set dp=1, or launch.pack=1"
            )
        return self


def run_config(job: JobConfig) -> RunConfig:
    """What is trained, alone: the same wherever and however it runs."""
    return RunConfig(**{name: getattr(job, name) for name in RunConfig.model_fields})


def config_to_yaml(config: RunConfig) -> str:
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # five times faster, where it is
    return yaml.dump(config.model_dump(mode="json"), Dumper=dumper, sort_keys=False)


def result_digest(job: JobConfig) -> str:
    """The same for two runs that give the same result: names and W&B play no part.

    `dp` and `train.device` do: they change the last digits, which training carries far.
    """
    run = run_config(job)
    wandb = WandbConfig(mode="disabled", project="", entity=None, group=None, tags=[])
    track = run.track.model_copy(update={"wandb": wandb})
    return config_digest(run.model_copy(update={"experiment": "", "track": track}))
