"""Parts of the user's own: a loss, metric, figure or causal-importance function by import path.

A part is a function (or class) such as `def my_loss(model, batch, *, power: float)`. What stands
before the * is given to it where it is used; after the * stand its options, given in the config.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from spd_core.base_config import CustomConfig
from spd_core.config import RunConfig
from spd_core.config.metrics import CustomMetricConfig

Part = Callable[..., Any]
GIVEN: dict[str, str] = dict.fromkeys(("loss", "metric", "figure"), "model, batch")
GIVEN["ci_fn"] = "C, d_in, generator"
# An option may be called model_size: the prefix means nothing here.
OPTIONS = ConfigDict(extra="forbid", protected_namespaces=())


def _load_part(field: str, config: CustomConfig, kind: str) -> Part:
    """The part with its options bound, after they are checked against its annotations.

    Raises:
        ValueError: it cannot be imported, takes other arguments, or an option does not fit.
    """
    at = f"{field}.path={config.path}"
    module, _, name = config.path.rpartition(".")
    try:
        part = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{at}: {error}; a part is found in the repository, "
            "in an installed package, or in a folder of PYTHONPATH"
        ) from None
    if not callable(part):
        raise ValueError(f"{at} is no function or class")
    try:
        parameters = inspect.signature(part, eval_str=True).parameters.values()
    except NameError as error:
        raise ValueError(f"{at}: an annotation cannot be read: {error}") from None
    given = ", ".join(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    if given != GIVEN[kind]:
        raise ValueError(
            f"{at} takes ({given}); a {kind} takes ({GIVEN[kind]}), and its options after a *"
        )
    declared: Any = {}
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY:
            if p.annotation is p.empty:
                raise ValueError(f"{at}: {p.name} has no annotation to check")
            declared[p.name] = (p.annotation, ... if p.default is p.empty else p.default)
    schema = create_model(name, __config__=OPTIONS, **declared)
    try:
        options = schema.model_validate(config.model_extra)
    except ValidationError as error:
        problems = [f"{field}.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        known = ", ".join(declared) or "none"
        raise ValueError(f"{'; '.join(problems)} (options of {config.path}: {known})") from None
    return partial(part, **dict(options))


# A loss is asked for at every step; configs are frozen, which makes them hashable.
load_part: Callable[[str, CustomConfig, str], Part] = cache(_load_part)  # pyright: ignore


def check_parts(config: RunConfig) -> None:
    """Load every part that the config names, so that a mistake shows before anything runs."""
    for name, loss in config.losses.configured().items():
        if isinstance(loss, CustomConfig):
            load_part(f"losses.{name}", loss, "loss")
    for name, metric in config.eval.metrics.configured().items():
        if isinstance(metric, CustomMetricConfig):
            load_part(f"eval.metrics.{name}", metric, metric.kind)
    if isinstance(config.decompose.ci_fn, CustomConfig):
        load_part("decompose.ci_fn", config.decompose.ci_fn, "ci_fn")
