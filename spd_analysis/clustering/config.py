"""What a clustering is asked for; the values stand in default.yaml, an override is `a.b=value`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

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
    """The config in a YAML file, with `a.b=value` in place of what it says.

    Raises:
        ValueError: an override or the file cannot be read, or a field is wrong.
    """
    if not file.is_file():
        raise ValueError(f"no config at {file}")
    values = _read(file.read_text(), str(file))
    for override in overrides:
        path, equals, text = override.partition("=")
        *parents, key = path.split(".")
        place = values
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not equals or not isinstance(place, dict):
            raise ValueError(f"{override!r} is no FIELD=VALUE; fields are {', '.join(_names())}")
        place[key] = _read(text, override)
    try:
        return ClusteringConfig.model_validate(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        fields = ", ".join(_names())
        raise ValueError(f"clustering config: {'; '.join(problems)} (fields: {fields})") from None


def _read(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}") from None


def _names() -> list[str]:
    return list(ClusteringConfig.model_fields)
