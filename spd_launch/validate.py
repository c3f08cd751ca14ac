"""Composed values -> JobConfig, with errors that name the field, the value and the nearest name."""

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from spd_analysis.clustering import config as clustering
from spd_analysis.harvest import config as harvest
from spd_core.config import RunConfig
from spd_core.parts import check_parts
from spd_core.targets.config import (
    CustomTargetConfig,
    InductionTargetConfig,
    ResidMLPTargetConfig,
    TargetConfig,
    TMSTargetConfig,
    TransformerTargetConfig,
)
from spd_launch.compose import Composed, as_typed
from spd_launch.config import JobConfig, LaunchConfig
from spd_launch.errors import LaunchError, nearest
from spd_launch.steps import check_steps

LLAMA_MLP = ("gate_proj", "up_proj", "down_proj")


PROCESSES = "dp, cluster.nodes and cluster.gpus_per_node say how many processes run where"
ANSWER = "the launcher reads the answer of sbatch"
LOGS = "logs lie where the commands look for them"
# Options of sbatch that are the launcher's: what it, or a field of its own, decides by them.
OWN_OPTIONS = {
    "array": "the launcher knows which task is which run; launch.max_parallel throttles",
    "job-name": "jobs are found by the launch's id; launch.name is for people",
    "signal": "cluster.signal_delay_s says when; every rank must hear it, as USR2",
    "output": LOGS, "error": LOGS, "open-mode": f"{LOGS}, and a requeued job goes on in them",
    "clusters": "only the Slurm of this machine is asked about jobs",
    "requeue": "cluster.requeue decides it", "no-requeue": "cluster.requeue decides it",
    "nodes": PROCESSES, "ntasks": PROCESSES, "ntasks-per-node": PROCESSES,
    "cpus-per-task": "cluster.cpus_per_task also goes to srun and OMP_NUM_THREADS",
    "time": "cluster.time_min is also compared with cluster.signal_delay_s",
    "parsable": ANSWER, "quiet": ANSWER, "wait": ANSWER, "test-only": ANSWER, "wrap": ANSWER,
}  # fmt: skip


def known_modules(target: TargetConfig) -> list[str]:
    """The decomposable modules of a target, known without building it; none of a custom one."""
    match target:
        case TMSTargetConfig(n_hidden_layers=n):
            return ["linear1", *(f"hidden_layers.{i}" for i in range(n)), "linear2"]
        case ResidMLPTargetConfig(n_layers=n):
            return [f"layers.{i}.{part}" for i in range(n) for part in ("mlp_in", "mlp_out")]
        case InductionTargetConfig(n_layers=n):
            parts = ("q_proj", "k_proj", "v_proj", "out_proj")
            blocks = [f"blocks.{i}.attn.{part}" for i in range(n) for part in parts]
            return ["wte", *blocks, "lm_head"]
        case TransformerTargetConfig(kind=kind, n_layers=n):
            mlp = ("c_fc", "down_proj") if kind != "llama_simple" else LLAMA_MLP
            parts = [*(f"attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}" for p in mlp)]
            return ["wte", *(f"h.{i}.{part}" for i in range(n) for part in parts), "lm_head"]
        case CustomTargetConfig():
            return []


def validate_all(composed: Sequence[Composed]) -> list[tuple[dict[str, str], JobConfig]]:
    """Each run's overrides and config; nothing is sent while one run is wrong.

    Raises:
        LaunchError: as `validate`; of several runs the wrong ones are named by their overrides:
            the first of each kind of mistake, up to three kinds. What not all of them have comes
            first.
    """
    common = set.intersection(*(set(run.overrides.items()) for run in composed))
    runs: list[tuple[dict[str, str], JobConfig]] = []
    wrong: dict[str, list[str]] = {}  # message -> the runs that it is about
    for run in composed:
        try:
            runs.append((run.overrides, validate(run.values)))
        except LaunchError as error:
            if len(composed) == 1:
                raise
            told = sorted(run.overrides.items(), key=lambda override: override in common)
            wrong.setdefault(str(error), []).append(as_typed(dict(told)))
    if wrong:
        n = sum(map(len, wrong.values()))
        lines = [f"{n} of {len(composed)} runs cannot be, so none was sent:"]
        for message, (first, *others) in list(wrong.items())[:3]:
            lines += [
                first,
                f"  {message}",
                *([f"  {len(others)} more likewise"] if others else []),
            ]
        raise LaunchError("\n       ".join(lines))
    return runs


def validate(values: dict[str, Any]) -> JobConfig:
    """Check one run before anything is sent.

    Raises:
        LaunchError: one line per wrong field.
    """
    try:
        config = JobConfig.model_validate(values)
    except ValidationError as error:
        raise LaunchError(problems(error, values, JobConfig)) from None
    _check_modules(config)
    check_steps(config.launch.then, config.launch.goal)
    _check_step_options(config.launch)
    try:
        check_parts(config)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    cluster, out_dir = config.cluster, str(config.launch.out_dir)
    if cluster.kind == "slurm" and ("%" in out_dir or not out_dir.isprintable()):
        raise LaunchError(
            f"launch.out_dir={out_dir!r}: Slurm takes % in the path of a log for a pattern, and "
            "line ends for its end; choose another folder"
        )
    if cluster.kind == "slurm" and cluster.signal_delay_s >= 60 * cluster.time_min:
        raise LaunchError(
            f"cluster.signal_delay_s={cluster.signal_delay_s} is no less than the time limit, "
            f"cluster.time_min={cluster.time_min} min: the job would stop as it starts"
        )
    _check_options_of_sbatch(cluster.sbatch)
    return config


def _check_options_of_sbatch(given: Collection[str]) -> None:
    """Refuse options that the launcher sets; sbatch also takes an unambiguous beginning of one."""
    for name in given:
        for own, why in OWN_OPTIONS.items():
            if own.startswith(name.replace("_", "-")):
                raise LaunchError(f"cluster.sbatch.{name}: --{own} is the launcher's: {why}")


def _check_step_options(launch: LaunchConfig) -> None:
    checks = {"clustering": clustering, "harvest": harvest}
    for step, module in checks.items():
        if step in launch.then:
            options = getattr(launch, step).options
            try:
                module.load_config(module.DEFAULT, options)
            except ValueError as error:
                raise LaunchError(f"launch.{step}.options: {error}") from None
            if step == "clustering" and any(option.startswith("seed=") for option in options):
                raise LaunchError("launch.clustering.options: seed: members have seeds 0 to n - 1")
    if "cluster_distances" in launch.then and launch.clustering.n < 2:
        raise LaunchError(
            f"launch.clustering.n={launch.clustering.n}: distances need an ensemble of two or more "
            "(a single one: python -m spd_analysis.clustering RUN)"
        )


def problems(error: ValidationError, values: Any, schema: type[BaseModel]) -> str:
    """What is wrong with values for a schema, one line per wrong field."""
    lines: dict[str, str] = {}  # a union reports once per member: the first one is enough
    for details in error.errors(include_url=False):
        path = _path(details, values)
        lines.setdefault(".".join(path), _line(details, path, schema))
    return "\n       ".join(dict.fromkeys(lines.values()))


def _line(details: ErrorDetails, path: list[str], schema: type[BaseModel]) -> str:
    name, given = ".".join(path), details["input"]
    if details["type"] == "extra_forbidden":
        parent = ".".join(path[:-1])
        where = f"in {parent}" if parent else "at the top level"
        valid = nearest(path[-1], field_names(path[:-1], schema))
        return f"{name}={given}: no field {path[-1]!r} {where}{valid}"
    parent = ".".join(path[:-1])
    group = ".".join(path[:-2])
    parts = field_names(path[:-2], schema) if group in ("losses", "eval.metrics") else set()
    if parts and path[-2] not in parts and details["type"] == "missing" and "path" not in given:
        kind = "loss" if path[0] == "losses" else "metric"
        return (
            f"{parent}: no {kind} is named {path[-2]!r}{nearest(path[-2], parts)}; "
            f"one of your own is {parent}={{path: my_package.my_{kind}, ...}}"
        )
    if details["type"] == "missing" or given == "???":
        return f"{name}: needs a value, {name}=..."
    message = details["msg"].removeprefix("Value error, ")
    if isinstance(given, dict):  # a check over several fields names them itself
        return f"{name}: {message}" if name else message
    return f"{name}={given}: {message[0].lower()}{message[1:]}"


def _path(details: ErrorDetails, values: Any) -> list[str]:
    """The place of an error as the user writes it: without pydantic's names of union members."""
    path = []
    for part in details["loc"]:
        if isinstance(values, list):
            values = dict(enumerate(values))
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif details["type"] != "missing" or part != details["loc"][-1]:
            continue
        path.append(str(part))
    return path


def field_names(path: list[str], schema: type[BaseModel]) -> set[str]:
    """The fields that the schema has at this place."""
    models = [t for t in types_at(path, schema) if isinstance(t, type) and issubclass(t, BaseModel)]
    return {name for model in models for name in _fields(model)}


def types_at(path: list[str], schema: type[BaseModel]) -> list[Any]:
    """What may stand at this place of the schema: the members of a union one by one."""
    types: list[Any] = [schema]
    for key in path:
        types = [inner for outer in types for inner in _inside(outer, key)]
    return types


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    """The fields by the names that the user writes."""
    return {f.alias or name: f.annotation for name, f in model.model_fields.items()}


def _inside(outer: Any, key: str) -> list[Any]:
    origin = get_origin(outer)
    if origin is dict:
        return _members(get_args(outer)[1])
    if origin is list:
        return _members(get_args(outer)[0])
    if isinstance(outer, type) and issubclass(outer, BaseModel) and key in _fields(outer):
        return _members(_fields(outer)[key])
    return []


def _members(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [inner for arg in get_args(annotation) for inner in _members(arg)]
    return [annotation]


def _check_modules(config: RunConfig) -> None:
    known = known_modules(config.target)
    if not known:
        return  # the run itself finds out, before it trains
    patterns = [p for p, C in config.decompose.modules.items() if C is not None]
    matches = {p: [m for m in known if fnmatchcase(m, p)] for p in patterns}
    for pattern, modules in matches.items():
        if not modules:
            raise LaunchError(
                f"decompose.modules: {pattern!r} matches no module of the "
                f"{config.target.kind} target{nearest(pattern, known)}"
            )
    decomposed = [module for modules in matches.values() for module in modules]
    decomposed += [
        f"{module}.pre_identity"
        for module in known
        if any(fnmatchcase(module, p) for p in config.decompose.identity_modules)
    ]
    for module in decomposed:
        if decomposed.count(module) > 1:
            patterns = " and ".join(p for p, modules in matches.items() if module in modules)
            raise LaunchError(f"decompose.modules: {module!r} is matched by {patterns}; keep one")
    metrics = config.eval.metrics
    solutions = metrics.identity_ci_error.modules if metrics.identity_ci_error else {}
    named = {
        "decompose.tied": [name for pair in config.decompose.tied for name in pair],
        "eval.metrics.identity_ci_error.modules": list(solutions),
        "eval.metrics.mmcs_ml2r.modules": list(metrics.mmcs_ml2r.modules)
        if metrics.mmcs_ml2r
        else [],
    }
    for field, names in named.items():
        for name in names:
            if name not in decomposed:
                raise LaunchError(f"{field}: {name!r} is not decomposed{nearest(name, decomposed)}")
    for name, pattern in solutions.items():
        assert isinstance(config.target, TMSTargetConfig | ResidMLPTargetConfig)
        if pattern.kind == "identity" and pattern.n != config.target.n_features:
            raise LaunchError(
                f"eval.metrics.identity_ci_error.modules.{name}.n={pattern.n}: the target has "
                f"target.n_features={config.target.n_features}"
            )
