"""From command-line overrides and sweep files to composed values: one dict per run, by Hydra.

A plain `a.b=value` may reach any field of the schema, also one that the YAML leaves out (as
`++a.b=value` does in Hydra); that the field exists is checked afterwards by `validate.py`, which
knows the valid names. What stands in files is composed by Hydra once per choice of files.
"""

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spd_core.config import named_run
from spd_launch.errors import LaunchError, nearest
from spd_launch.values import Setting, Tree, references, resolve, split_key, with_value

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CONF = Path(__file__).parent / "conf"
PACKAGE_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Composed:
    """One run as Hydra composed it; `overrides` is what was asked for it, key by key."""

    overrides: dict[str, str]
    values: dict[str, Any]


def user_folders(name: str) -> list[Path]:
    """The folder of this name in the current directory, then in the repository: the first wins."""
    folders = dict.fromkeys([Path.cwd() / name, PACKAGE_ROOT / name])
    return [folder for folder in folders if folder.is_dir()]


def template_folders() -> list[Path]:
    return user_folders("slurm_templates")


def experiment_names() -> list[str]:
    return sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))


def cluster_names() -> list[str]:
    return sorted({f.stem for folder in template_folders() for f in folder.glob("cluster/*.yaml")})


def sweep_names() -> list[str]:
    return sorted({f.stem for folder in user_folders("sweeps") for f in folder.glob("*.yaml")})


def default_cluster() -> str:
    return "default" if shutil.which("sbatch") else "local"


def compose(arguments: list[str], multirun: bool) -> list[Composed]:
    """Compose every run that the overrides name; several values (`seed=0,1,2`) need `multirun`.

    `sweep=NAME` gives the runs of sweeps/NAME.yaml; other overrides replace what it says, and with
    several values multiply it; runs of a sweep that come out the same are one.

    Raises:
        LaunchError: an override or sweep cannot be read, or names no experiment, cluster or config.
    """
    typed = _typed(arguments, multirun)
    rows = _sweep_rows(typed) if "sweep" in typed else [{}]
    runs = [
        {**row, **dict(zip(typed, settings, strict=True))}
        for row in rows
        for settings in itertools.product(*typed.values())
    ]
    if len(rows) > 1:
        runs = list({repr(run): run for run in runs}.values())
    _check_names(runs)
    with _hydra():
        return [_compose_one(run) for run in runs]


def _typed(arguments: list[str], multirun: bool) -> dict[str, list[Setting]]:
    """key -> what it is set to in one run after the other (one where the key is not swept)."""
    typed: dict[str, list[Setting]] = {}
    for argument in arguments:
        override, name = _parse(argument)
        settings = [_setting(name, one) for one in _each(argument, override)]
        if override.is_sweep_override() and not multirun:
            raise LaunchError(f"{argument!r} names several values: add -m to run each of them")
        typed.pop(name, None)  # what is typed again stands, and holds, where it was typed last
        typed[name] = settings
    return typed


def _parse(argument: str) -> tuple["Override", str]:
    """Hydra's reading of an override, and its key, in which Hydra itself takes no brackets."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = argument.partition("=")
    bracketed = "[" in key and bool(equals)
    try:
        override = OverridesParser.create().parse_override(f"x={value}" if bracketed else argument)
    except HydraException as error:
        message = str(error).splitlines()[0]
        raise LaunchError(f"cannot read the override {argument!r}: {message}") from None
    return override, key if bracketed else override.key_or_group


def _each(argument: str, override: "Override") -> "list[Override]":
    """The override with each of its values."""
    from hydra.core.override_parser.types import Glob, ValueType

    if not override.is_sweep_override():
        return [override]
    if not override.is_discrete_sweep():
        raise LaunchError(
            f"{argument!r} names no values to run; choice() and range() do, and `random` of a "
            "sweep file draws from an interval (docs/sweeps.md)"
        )
    if isinstance(glob := override.value(), Glob):
        names = names_in(override.key_or_group)
        values: list[Any] = glob.filter(names)
        if not values:
            valid = nearest(" ".join(glob.include), names)
            raise LaunchError(f"{argument!r} fits no {override.key_or_group}{valid}")
    else:
        values = list(override.sweep_iterator())
    return [replace(override, value_type=ValueType.ELEMENT, _value=value) for value in values]


def names_in(group: str) -> list[str]:
    """What a group of config files has to choose from."""
    if group == "cluster":
        return cluster_names()
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _setting(name: str, override: "Override") -> Setting:
    key = override.get_key_element()
    if override.is_delete():
        return Setting("deleted", None, key)
    shown = override.get_value_element_as_str()
    if name in ("experiment", "sweep"):
        key = f"+{name}"
    to_hydra = _is_group(name) or key[0] == "+" or "@" in key
    return Setting(shown, override.value(), f"{key}={shown}" if to_hydra else None)


def _is_group(key: str) -> bool:
    """Whether a word for this key names a file."""
    return key == "cluster" or ("." not in key and (CONF / key).is_dir())


def _sweep_rows(typed: dict[str, list[Setting]]) -> list[dict[str, Setting]]:
    """What a sweep file says of each run; takes the sweep's and its experiments' keys away."""
    from spd_launch.sweep import expand, read_sweep

    asked = typed.pop("sweep")
    if len(asked) > 1:
        raise LaunchError("one sweep at a time")
    name = asked[0].shown
    files = [folder / f"{name}.yaml" for folder in user_folders("sweeps")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise LaunchError(f"no sweep named {name!r}{nearest(name, sweep_names())}")
    sweep = read_sweep(file)
    rows = expand(sweep, str(file))
    if sweep.experiments and "experiment" in typed:
        chosen = [setting.shown for setting in typed.pop("experiment")]
        for experiment in chosen:
            if experiment not in sweep.experiments:
                valid = nearest(experiment, sweep.experiments)
                raise LaunchError(f"{file} has no experiment {experiment!r}{valid}")
        rows = [row for row in rows if row["experiment"].shown in chosen]
    return [{"sweep": Setting(name, name, None)} | _with_choices(row) for row in rows]


def _with_choices(row: dict[str, Setting]) -> dict[str, Setting]:
    """A word for the key of a group chooses a file of it."""
    plus = {"experiment": "+experiment"}
    return {
        key: replace(setting, choice=f"{plus.get(key, key)}={setting.value}")
        if _is_group(key) and isinstance(setting.value, str)
        else setting
        for key, setting in row.items()
    }


@contextmanager
def _hydra() -> Iterator[None]:
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def _compose_one(asked: dict[str, Setting]) -> Composed:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    overrides = {key: setting.shown for key, setting in asked.items()}
    choices = [setting.choice for setting in asked.values() if setting.choice is not None]
    if "cluster" not in asked:
        choices.append(f"cluster={default_cluster()}")
    try:
        values = _base((_search_path(), *choices))
        for key, setting in asked.items():
            if setting.choice is None and key != "sweep":
                values = with_value(values, split_key(key), setting.value)
        values = resolve(values)
    except (HydraException, OmegaConfBaseException) as error:
        raise LaunchError(f"{as_typed(overrides)}: {error}") from None
    out_dir = Path(values["launch"]["out_dir"]).expanduser().absolute()
    values = with_value(values, ("launch", "out_dir"), str(out_dir))
    if values["target"].get("from_run") is not None:
        run = _frozen_run(str(values["target"]["from_run"]))
        values = with_value(values, ("target", "from_run"), run)
    return Composed(overrides, values)


def _frozen_run(reference: str) -> str:
    """The run that is meant here and now: jobs have another current folder."""
    try:
        run = named_run(reference)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    return str(Path(run).resolve()) if Path(run, "config.yaml").is_file() else run


def as_typed(overrides: dict[str, str]) -> str:
    return " ".join(f"{key}={shown}" for key, shown in overrides.items())


def _check_names(runs: list[dict[str, Setting]]) -> None:
    if any("experiment" not in run for run in runs):
        raise LaunchError(
            "choose an experiment, +experiment=NAME, or a sweep, +sweep=NAME"
            f"{nearest('', experiment_names())}"
        )
    for group in ("experiment", "cluster"):
        valid = names_in(group)
        for name in dict.fromkeys(run[group].shown for run in runs if group in run):
            if name not in valid:
                raise LaunchError(f"no {group} named {name!r}{nearest(name, valid)}")


@cache
def _base(choices: tuple[str, ...]) -> Tree:
    """What the config files say; Hydra needs a tenth of a second for it, so once per choice.

    The folders of the files are among the choices: the same word means another file elsewhere.
    """
    import hydra
    from omegaconf import OmegaConf

    config = hydra.compose("config", list(choices))
    values = OmegaConf.to_container(config)
    assert isinstance(values, dict)
    values = {str(key): value for key, value in values.items()}
    for path, text in references(values):
        if text.startswith("${oc.env:"):  # the same in all runs
            values = with_value(values, path, OmegaConf.select(config, ".".join(path)))
    return values


def _search_path() -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    return f"hydra.searchpath=[{','.join(quoted(f'file://{f}') for f in template_folders())}]"
