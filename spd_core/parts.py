"""Parts of the user's own: a loss, metric, figure or causal-importance function by import path.

A part is a function (or class) whose positional parameters are given by the place where it is used
and whose keyword-only parameters are its options:

    def my_loss(model, batch, *, power: float) -> LossParts: ...

in the config as `losses.mine={path: my_package.my_loss, coeff: 1.0, power: 0.5}`.
"""

import importlib
import inspect
import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from spd_core.base_config import CustomConfig
from spd_core.config import RunConfig
from spd_core.config.metrics import CustomMetricConfig

POSITIONAL = {
    "loss": ("model", "batch"),
    "metric": ("model", "batch"),
    "figure": ("model", "batch"),
    "ci_fn": ("C", "d_in", "generator"),
}
# An option may be called model_size: the prefix means nothing here.
OPTIONS = ConfigDict(extra="forbid", protected_namespaces=())


def load_part(field: str, config: CustomConfig, kind: str) -> Callable[..., Any]:
    """The part with its options bound, after they are checked against its annotations.

    Raises:
        ValueError: it cannot be imported, takes other arguments, or an option does not fit; the
            message names the config field.
    """
    return _load(field, config.path, json.dumps(config.options, sort_keys=True), kind)


@cache  # a loss is asked for at every step
def _load(field: str, path: str, options_json: str, kind: str) -> Callable[..., Any]:
    module_name, _, name = path.rpartition(".")
    try:
        part = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{field}.path={path}: {error}; a part is found in the repository, "
            "in an installed package, or in a folder of PYTHONPATH"
        ) from None
    if not callable(part):
        raise ValueError(f"{field}.path={path} is no function or class")
    parameters = inspect.signature(part).parameters.values()
    positional = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    if positional != POSITIONAL[kind]:
        raise ValueError(
            f"{field}.path={path} takes ({', '.join(positional)}); a {kind} takes "
            f"({', '.join(POSITIONAL[kind])}), and its options after a *"
        )
    try:
        hints = get_type_hints(
            part.__init__ if inspect.isclass(part) else part, include_extras=True
        )
    except NameError as error:
        raise ValueError(f"{field}.path={path}: an annotation cannot be read: {error}") from None
    unchecked = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in hints]
    if unchecked:
        raise ValueError(f"{field}.path={path}: {', '.join(unchecked)} has no annotation to check")
    declared: Any = {
        p.name: (hints[p.name], ... if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    options: Any = create_model(name, __config__=OPTIONS, **declared)
    try:
        checked = options.model_validate(json.loads(options_json))
    except ValidationError as error:
        problems = [f"{field}.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        known = ", ".join(declared) or "none"
        raise ValueError(f"{'; '.join(problems)} (options of {path}: {known})") from None
    return partial(part, **{key: getattr(checked, key) for key in declared})


def check_parts(config: RunConfig) -> None:
    """Load every part that the config names, so that a mistake shows before anything runs.

    Raises:
        ValueError: as `load_part`.
    """
    for name, loss in config.losses.configured().items():
        if isinstance(loss, CustomConfig):
            load_part(f"losses.{name}", loss, "loss")
    for name, metric in config.eval.metrics.configured().items():
        if isinstance(metric, CustomMetricConfig):
            load_part(f"eval.metrics.{name}", metric, metric.kind)
    if isinstance(config.decompose.ci_fn, CustomConfig):
        load_part("decompose.ci_fn", config.decompose.ci_fn, "ci_fn")
