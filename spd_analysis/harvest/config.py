"""What a harvest is asked for; the values stand in default.yaml."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from spd_analysis.options import load_options
from spd_core.base_config import BaseConfig, Count, Fraction, Seed

DEFAULT = Path(__file__).with_name("default.yaml")


class HarvestConfig(BaseConfig):
    batches: Count = Field(description="of the run's own data (text: of the training split)")
    batch_size: Count | None = Field(description="examples; null = a rank's of the run's eval")
    seed: Seed = Field(description="of the data")
    threshold: Fraction = Field(description="a subcomponent fires where its ci is above")
    top_k: Count = Field(description="examples kept of each subcomponent")
    window: Annotated[int, Field(ge=0)] = Field(description="positions on each side of an example")


def load_config(file: Path, overrides: Sequence[str]) -> HarvestConfig:
    """As `load_options`; DEFAULT holds the shipped values."""
    return load_options(HarvestConfig, file, overrides)
