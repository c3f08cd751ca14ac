"""What every section of a config is built from."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Seed = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class BaseConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CustomConfig(BaseConfig, extra="allow"):
    """A part of the user's own: whatever stands at `path`, with options that it declares itself."""

    path: str = Field(pattern=r"^\w+(\.\w+)+$", description="import path, my_package.my_part")


class ScheduleConfig(BaseConfig):
    """A value over training: linear warm-up from 0, then `kind` from `start` to `end`."""

    kind: Literal["constant", "linear", "cosine"]
    start: float = Field(description="value after the warm-up")
    end: float = Field(description="value at the last step; equals start for kind=constant")
    warmup_fraction: Fraction = Field(description="share of all steps spent rising from 0 to start")

    @model_validator(mode="after")
    def _constant_has_one_value(self) -> Self:
        if self.kind == "constant" and self.start != self.end:
            raise ValueError(f"kind=constant needs start == end, not {self.start} and {self.end}")
        return self
