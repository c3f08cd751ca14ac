"""What a clustering is asked for; the values stand in default.yaml, an override is `a.b=value`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from spd_analysis.options import load_options
from spd_core.base_config import BaseConfig, Count, Fraction, Positive, Seed

DEFAULT = Path(__file__).with_name("default.yaml")


class RangeDraw(BaseConfig):
    """Uniform among the pairs whose cost is close to that of the best."""

    kind: Literal["range"]
    threshold: Fraction = Field(description="as a share of (largest - least) over all pairs")


class MCMCDraw(BaseConfig):
    """A softmax of minus the costs."""

    kind: Literal["mcmc"]
    temperature: Positive = Field(description="in bits per sample")


class DataConfig(BaseConfig):
    """The run's own data, drawn anew; each position of an example is a sample."""

    n_samples: Count = Field(description="at least: batches are whole")
    batch_size: Count | None = Field(description="examples; null = a rank's of the run's eval")


class ClusteringConfig(BaseConfig):
    seed: Seed = Field(description="of the data and of the draws")
    data: DataConfig
    modules: list[str] = Field(min_length=1, description="fnmatch patterns of module paths")
    activation_threshold: Fraction | None = Field(
        description="active where the causal importance is above; null = its raw value counts"
    )
    filter_dead_threshold: Fraction = Field(
        description="dead, and left out, if no importance is above"
    )
    alpha: Annotated[float, Field(ge=0)] = Field(description="bits per active subcomponent")
    draw: Annotated[RangeDraw | MCMCDraw, Field(discriminator="kind")]
    pop_component_prob: Annotated[float, Field(ge=0, lt=1)] = Field(description="per iteration")
    iters: Count | None = Field(description="null = until one group is left")


def load_config(file: Path, overrides: Sequence[str]) -> ClusteringConfig:
    """As `load_options`; DEFAULT holds the shipped values."""
    return load_options(ClusteringConfig, file, overrides)
