"""Steps in parts on a run that finished before, as a launch of their own.

    python -m spd_launch +pipeline=NAME run=RUN [n=N] [name=NAME] [FIELD=VALUE ...] [cluster=NAME]
        [cluster.FIELD=VALUE ...] [launch.FIELD=VALUE ...]

clustering   n clusterings on seeds 0 to n - 1, then how much they agree
harvest      n shards, then their merge

Other fields are those of the command itself, as alpha=0.5 or batches=200. What is there already is
not made again, so a larger n adds members to an ensemble. The launch lies beside the run's folder,
and has that run and the steps: status, logs, resume and cancel know them.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

from spd_core.config import load_config, named_run
from spd_core.run_dir import RunDir
from spd_launch.compose import PACKAGE_ROOT, compose, experiment_names
from spd_launch.config import JobConfig
from spd_launch.errors import LaunchError, nearest
from spd_launch.freeze import record
from spd_launch.ledger import LaunchDir, default_out_dir, read_rows
from spd_launch.plan import LaunchPlan, Task, clean, group, step_tasks
from spd_launch.run_record import read_status
from spd_launch.snapshot import code_for, drop_snapshot
from spd_launch.steps import STEPS, Row, step_command, step_rows
from spd_launch.validate import validate

PIPELINES = {
    "clustering": ["clustering", "cluster_distances"],
    "harvest": ["harvest", "merge_harvest"],
}


def launch_pipeline(arguments: list[str], start: Callable[..., int]) -> int:
    """Plan the steps, then hand them to `start`.

    Raises:
        LaunchError: the pipeline, the run or a field is wrong.
    """
    run_dir, config = plan_pipeline(arguments)
    run_id, options = run_dir.path.name, config.launch
    task = Task(0, run_id, {}, config, 1, 1, None, "decomposition")
    launch_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{clean(options.name or '')}-{token_hex(2)}"
    plan = LaunchPlan(launch_id, group([task]))
    launch = LaunchDir(options.out_dir / "launches" / launch_id)
    if options.dry_run:
        return _show(run_dir, config)
    launch.logs.mkdir(parents=True)
    try:
        code = code_for(options, launch.code, launch_id)
        # Without a digest: this is not the code that the run was trained on.
        record(launch, plan, replace(code, digest=None), [])
        steps = [row for row in read_rows(launch) if row.goal in STEPS]
        return start(
            launch, step_tasks(steps, {run_id: config}), config.cluster.kind, code.python_path
        )
    except BaseException:
        if not launch.jobs_file.exists():
            shutil.rmtree(launch.path)
            if options.snapshot != "off":
                drop_snapshot(PACKAGE_ROOT, launch_id)
        raise


def plan_pipeline(arguments: list[str]) -> tuple[RunDir, JobConfig]:
    """The run, and its config with where and how the steps run.

    Raises:
        LaunchError: as `launch_pipeline`.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.lstrip("+").partition("=")
        if not equals:
            raise LaunchError(f"{argument!r} is no FIELD=VALUE")
        given[key] = value
    pipeline = given.pop("pipeline")
    if pipeline not in PIPELINES:
        raise LaunchError(f"no pipeline named {pipeline!r}{nearest(pipeline, PIPELINES)}")
    if "run" not in given:
        raise LaunchError(f"+pipeline={pipeline} needs a finished run: run=FOLDER or run=ID")
    run_dir = _finished_run(given.pop("run"))
    launch = {k: v for k, v in given.items() if k.startswith("launch.")}
    where = {k: v for k, v in given.items() if k.split(".")[0] == "cluster"} | launch
    parts = {f"launch.{pipeline}.{key}": given[key] for key in ("n", "name") if key in given}
    own = [f"{k}={v}" for k, v in given.items() if k not in where and k not in ("n", "name")]
    if "launch.out_dir" in where:
        raise LaunchError("launch.out_dir: what a pipeline finds lies in its run's folder")
    # The experiment plays no part: of what is composed, only cluster and launch are looked at.
    asked = [f"{key}={value}" for key, value in (where | parts).items()]
    [composed] = compose([f"+experiment={experiment_names()[0]}", *asked], multirun=False)
    options = composed.values["launch"]
    options = options | {
        "out_dir": str(run_dir.path.parent.parent),
        "name": options["name"] or f"{pipeline}-{run_dir.path.name}",
        "then": PIPELINES[pipeline],
        pipeline: {**options[pipeline], "options": own},
    }
    try:
        run = load_config(run_dir.config_file).model_dump(mode="json")
    except ValueError as error:
        raise LaunchError(str(error)) from None
    # A step is one process, whatever the run was.
    one = {"dp": 1, "cluster": composed.values["cluster"] | {"nodes": None}, "launch": options}
    return run_dir, validate(run | one)


def _finished_run(reference: str) -> RunDir:
    try:
        reference = named_run(reference)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    folders = [Path(reference).expanduser(), default_out_dir() / "runs" / reference]
    found = next((f for f in folders if (f / "config.yaml").is_file()), None)
    if found is None:
        raise LaunchError(
            f"no run {reference!r}: neither a folder with a config.yaml, nor a run id in "
            f"{default_out_dir() / 'runs'} (SPD_OUT_DIR names another folder)"
        )
    run_dir = RunDir(found.resolve())
    status = read_status(run_dir)
    if status is None or status.state != "finished" or run_dir.path.parent.name != "runs":
        state = "has no status" if status is None else f"is {status.state}"
        raise LaunchError(
            f"run {run_dir.path} {state}: a pipeline needs a finished run in OUT/runs/; of what "
            "has a checkpoint, `python -m spd_analysis.clustering` and `.harvest` work alone"
        )
    return run_dir


def _show(run_dir: RunDir, config: JobConfig) -> int:
    run = Row(0, run_dir.path.name, {}, None, "decomposition", "", {})
    rows = step_rows(config.launch.then, [run], config.launch.parts())
    print(f"cluster={config.cluster.name}, each one process, {config.cluster.time_min} min")
    for row in rows:
        words = step_command(row, run_dir.path, config.launch.parts())
        print(f"  {row.name}   python -m {' '.join(words)}")
    print("dry run: nothing written, nothing sent")
    return 0
