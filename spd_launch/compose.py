"""From command-line overrides to composed values: one dict per run, by Hydra.

A plain `a.b=value` may reach any field of the schema, also one that the YAML leaves out (as
`++a.b=value` does in Hydra); that the field exists is checked afterwards by `validate.py`, which
knows the valid names.
"""

import copy
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_launch.errors import LaunchError, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = Path(__file__).parent / "conf"
PACKAGE_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Composed:
    """One run as Hydra composed it; `overrides` is what the user typed for it, key by key."""

    overrides: dict[str, str]
    values: dict[str, Any]


def template_folders() -> list[Path]:
    """slurm_templates/ of the current directory, then of the repository; the first wins."""
    folders = dict.fromkeys([Path.cwd() / "slurm_templates", PACKAGE_ROOT / "slurm_templates"])
    return [folder for folder in folders if folder.is_dir()]


def experiment_names() -> list[str]:
    return sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))


def cluster_names() -> list[str]:
    return sorted({f.stem for folder in template_folders() for f in folder.glob("cluster/*.yaml")})


def default_cluster() -> str:
    return "default" if shutil.which("sbatch") else "local"


def compose(arguments: list[str], multirun: bool) -> list[Composed]:
    """Compose every run that the overrides name; sweeps (`seed=0,1,2`) need `multirun`.

    Raises:
        LaunchError: an override cannot be read, or names no experiment, cluster or config.
    """
    choices = _choices(arguments, multirun)
    _check_names(choices)
    if "cluster" not in choices:
        choices["cluster"] = [f"cluster={default_cluster()}"]
    with _hydra():
        return [_compose_one(list(typed)) for typed in itertools.product(*choices.values())]


def _choices(arguments: list[str], multirun: bool) -> dict[str, list[str]]:
    """key -> the overrides it takes one after the other (one where the key is not swept)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    choices: dict[str, list[str]] = {}
    for argument in arguments:
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException as error:
            message = str(error).splitlines()[0]
            raise LaunchError(f"cannot read the override {argument!r}: {message}") from None
        key, name = override.get_key_element(), override.key_or_group
        if name == "experiment":
            key = "+experiment"
        if not override.is_sweep_override():
            choices[name] = [f"{key}={override.get_value_element_as_str()}"]
            if override.is_delete():
                choices[name] = [key]
        elif not multirun:
            raise LaunchError(f"{argument!r} names several values: add -m to run each of them")
        elif not override.is_discrete_sweep():
            raise LaunchError(f"{argument!r}: only lists, choice() and range() can be swept")
        else:
            choices[name] = [f"{key}={value}" for value in override.sweep_string_iterator()]
    return choices


def _check_names(choices: dict[str, list[str]]) -> None:
    if "experiment" not in choices:
        raise LaunchError(
            f"choose an experiment: +experiment=NAME{nearest('', experiment_names())}"
        )
    for group, valid in (("experiment", experiment_names()), ("cluster", cluster_names())):
        for override in choices.get(group, []):
            name = override.partition("=")[2]
            if name not in valid:
                raise LaunchError(f"no {group} named {name!r}{nearest(name, valid)}")


@contextmanager
def _hydra() -> Iterator[None]:
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def _compose_one(typed: list[str]) -> Composed:
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    plain = [override for override in typed if _is_plain(override)]
    try:
        config = copy.deepcopy(_base(tuple(o for o in typed if o not in plain)))
        for override in plain:
            key, value = _key_and_value(override)
            OmegaConf.update(config, key, value, merge=True, force_add=True)
        values = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise LaunchError(f"{' '.join(typed)}: {error}") from None
    assert isinstance(values, dict)
    values = {str(key): value for key, value in values.items()}
    values["launch"]["out_dir"] = str(Path(values["launch"]["out_dir"]).expanduser().absolute())
    target = values["target"]
    if "from_run" in target and (Path(str(target["from_run"])) / "config.yaml").is_file():
        target["from_run"] = str(Path(target["from_run"]).resolve())
    pairs = (override.lstrip("+").partition("=") for override in typed)
    return Composed({key: value for key, _, value in pairs}, values)


@cache
def _base(choices: tuple[str, ...]) -> "DictConfig":
    """What the config files say; Hydra needs a tenth of a second for it, so once per choice."""
    import hydra

    return hydra.compose("config", [_search_path(), *choices])


def _is_plain(override: str) -> bool:
    """Whether it sets a value, rather than choosing a file or changing the list of files."""
    key = override.partition("=")[0]
    return not ((CONF / key).is_dir() or key == "cluster" or key[0] in "+~" or "@" in key)


@cache
def _key_and_value(override: str) -> tuple[str, Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(override)
    return parsed.key_or_group, parsed.value()


def _search_path() -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    return f"hydra.searchpath=[{','.join(quoted(f'file://{f}') for f in template_folders())}]"
