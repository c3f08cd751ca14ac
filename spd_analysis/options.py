"""The options of a command: a YAML file with the shipped values, and FIELD=VALUE in their place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from spd_core.base_config import BaseConfig

Options = TypeVar("Options", bound=BaseConfig)


def load_options(model: type[Options], file: Path, overrides: Sequence[str]) -> Options:
    """What the file says, with `a.b=value` in place of its values; values are read as YAML.

    Raises:
        ValueError: an override or the file cannot be read, or a field is wrong.
    """
    if not file.is_file():
        raise ValueError(f"no options at {file}")
    values = _read(file.read_text(), str(file))
    fields = ", ".join(model.model_fields)
    for override in overrides:
        path, equals, text = override.partition("=")
        *parents, key = path.split(".")
        place = values
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not equals or not isinstance(place, dict):
            raise ValueError(f"{override!r} is no FIELD=VALUE; fields are {fields}")
        place[key] = _read(text, override)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"{'; '.join(problems)} (fields are {fields})") from None


def _read(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}") from None
