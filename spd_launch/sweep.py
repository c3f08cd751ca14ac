"""What a file of sweeps/ says, and the runs that it stands for; docs/sweeps.md is its manual.

A section (`global`, and one for each experiment) has values of five kinds: set, grid, zip, random,
and where. The runs of an experiment are the product of every grid key, every zip and the random
draws; what its own section says of a key replaces what `global` says. Pure, but for the file.
"""

import itertools
import math
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from spd_core.base_config import BaseConfig, Count, Positive, Seed
from spd_launch.conditions import holds
from spd_launch.errors import LaunchError
from spd_launch.validate import problems
from spd_launch.values import Setting, show

Choices = Annotated[list[Any] | dict[str, Any], Field(min_length=1)]
Run = dict[str, Setting]


class Interval(BaseConfig):
    @model_validator(mode="after")
    def _has_length(self) -> Self:
        low, high = self.model_dump()["low"], self.model_dump()["high"]
        if not low < high:
            raise ValueError(f"low={low:g} is not below high={high:g}")
        return self


class Uniform(Interval):
    kind: Literal["uniform"]
    low: float
    high: float


class LogUniform(Interval):
    """As many draws between 0.1 and 1 as between 1 and 10."""

    kind: Literal["log_uniform"]
    low: Positive
    high: Positive


class Int(Interval):
    """Whole numbers from low to high, both included."""

    kind: Literal["int"]
    low: int
    high: int


class Choice(BaseConfig):
    kind: Literal["choice"]
    values: Choices


Draw = Annotated[Uniform | LogUniform | Int | Choice, Field(discriminator="kind")]


class RandomDraws(BaseConfig):
    """A key's draws depend on the seed and the key alone: more keys or a larger n keep them."""

    n: Count
    seed: Seed
    keys: dict[str, Draw] = Field(min_length=1)


class Section(BaseConfig):
    """Keys are those of the config; where choices are a mapping, its keys name them."""

    set: dict[str, Any] = Field({}, description="the same in all runs")
    grid: dict[str, Choices] = Field({}, description="each with each")
    zip: list[dict[str, Choices]] = Field([], description="groups of keys that move together")
    random: RandomDraws | None = None
    where: list[str] = Field([], description="conditions that a run must meet")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for together in self.zip:
            lengths = {key: len(values) for key, values in together.items()}
            if len(set(lengths.values())) != 1:
                shown = ", ".join(f"{key} has {n}" for key, n in lengths.items())
                raise ValueError(f"values of a zip move together, but {shown or 'there are none'}")
        places = [self.set, self.grid, *self.zip, self.random.keys if self.random else {}]
        keys = [key for place in places for key in place]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{twice[0]} stands in two of set, grid, zip and random")
        return self


NOTHING = Section.model_validate({})


class Sweep(BaseConfig):
    everywhere: Section = Field(NOTHING, alias="global")
    experiments: dict[str, Section | None] = Field({}, description="null = only what global says")


def read_sweep(file: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        LaunchError: it is no valid sweep; the message names file, key, and the nearest valid one.
    """
    from omegaconf import OmegaConf  # reads 1e-3 as a number, which YAML itself does not
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        values = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException) as error:
        raise LaunchError(f"{file} cannot be read: {error}") from None
    try:
        return Sweep.model_validate(values)
    except ValidationError as error:
        raise LaunchError(f"{file}: {problems(error, values, Sweep)}") from None


def expand(sweep: Sweep, name: str) -> list[Run]:
    """The runs, in the order of the file; `name` is the sweep's in messages.

    Raises:
        LaunchError: a condition cannot be decided, or lets no run of an experiment through.
    """
    if not sweep.experiments:
        return _runs([sweep.everywhere], {}, f"{name}: global")
    runs: list[Run] = []
    for experiment, section in sweep.experiments.items():
        first = {"experiment": Setting(experiment, experiment, None)}
        sections = [sweep.everywhere, section or NOTHING]
        runs += _runs(sections, first, f"{name}: {experiment}")
    return runs


def _runs(sections: list[Section], first: Run, name: str) -> list[Run]:
    """Runs of one experiment: a later section replaces what an earlier one says of a key."""
    products = [_product(section) for section in sections]
    runs = [first | _united(parts) for parts in itertools.product(*products)]
    different = {repr(run): run for run in runs}.values()
    conditions = [condition for section in sections for condition in section.where]
    kept = [run for run in different if all(_met(text, run, name) for text in conditions)]
    if not kept:
        raise LaunchError(f"{name}: no run meets where: {' and '.join(conditions)}")
    return kept


def _met(condition: str, run: Run, name: str) -> bool:
    try:
        return holds(condition, run)
    except LaunchError as error:
        raise LaunchError(f"{name}: where: {condition}: {error}") from None


def _product(section: Section) -> list[Run]:
    fixed = {key: Setting(show(value), value, None) for key, value in section.set.items()}
    axes = [[{key: setting} for setting in _settings(v)] for key, v in section.grid.items()]
    axes += [_together({key: _settings(v) for key, v in group.items()}) for group in section.zip]
    if section.random is not None:
        n, seed = section.random.n, section.random.seed
        keys = section.random.keys.items()
        axes.append(
            _together({key: _draws(draw, n, Random(f"{seed}:{key}")) for key, draw in keys})
        )
    return [fixed | _united(parts) for parts in itertools.product(*axes)]


def _united(parts: tuple[Run, ...]) -> Run:
    return {key: setting for part in parts for key, setting in part.items()}


def _together(columns: dict[str, list[Setting]]) -> list[Run]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _settings(choices: list[Any] | dict[str, Any]) -> list[Setting]:
    if isinstance(choices, dict):
        return [Setting(name, value, None) for name, value in choices.items()]
    return [Setting(show(value), value, None) for value in choices]


def _draws(draw: Draw, n: int, random: Random) -> list[Setting]:
    """n draws; numbers have four significant digits, which keeps names short."""
    match draw:
        case Choice(values=values):
            settings = _settings(values)
            return [settings[int(random.random() * len(settings))] for _ in range(n)]
        case Int(low=low, high=high):
            numbers = [low + int(random.random() * (high - low + 1)) for _ in range(n)]
        case LogUniform(low=low, high=high):
            low, high = math.log(low), math.log(high)
            exponents = [low + (high - low) * random.random() for _ in range(n)]
            numbers = [float(f"{math.exp(x):.4g}") for x in exponents]
        case Uniform(low=low, high=high):
            numbers = [float(f"{low + (high - low) * random.random():.4g}") for _ in range(n)]
    return _settings(numbers)
