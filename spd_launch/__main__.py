"""python -m spd_launch +experiment=tms_5-2 [key=value ...], or +sweep=NAME

Compose, validate, plan, take a snapshot of the code, then run here or submit to Slurm.
"""

import argparse
import sys
from pathlib import Path

from spd_launch.compose import (
    PACKAGE_ROOT,
    Composed,
    cluster_names,
    compose,
    default_cluster,
    experiment_names,
    sweep_names,
)
from spd_launch.errors import LaunchError, exit_with
from spd_launch.steps import STEPS

USAGE = "python -m spd_launch [-m] +experiment=NAME | +sweep=NAME [key=value ...]"
EXAMPLES = """examples:
  python -m spd_launch +experiment=tms_5-2                    on Slurm if there is sbatch, else here
  python -m spd_launch +experiment=tms_5-2 cluster=local train.steps=500
  python -m spd_launch +experiment=tms_5-2 cluster=cpu dp=16          2 nodes x 8 tasks
  python -m spd_launch -m +experiment=tms_5-2 seed=0,1,2              three runs, one job array
  python -m spd_launch +sweep=NAME                            the runs of sweeps/NAME.yaml
  python -m spd_launch +experiment=tms_5-2 launch.dry_run=true        what would be done
  python -m spd_launch +experiment=tms_5-2 launch.goal=target         only train the target
  python -m spd_launch +experiment=tms_5-2 --cfg job                  the composed config
  python -m spd_launch +pipeline=clustering run=RUN n=8               steps on a finished run

afterwards:
  python -m spd_launch.status [LAUNCH]     python -m spd_launch.logs LAUNCH [TASK] [-f]
  python -m spd_launch.resume LAUNCH       python -m spd_launch.cancel LAUNCH [TASK]
  python -m spd_launch.results LAUNCH      python -m spd_launch.prune"""


def main() -> int:
    if not sys.flags.safe_path:
        # Look for a user's own parts where the run will: not in the current folder.
        sys.path[0] = str(PACKAGE_ROOT)
    options = _parser().parse_intermixed_args()
    if options.completion:
        from spd_launch.completion import SCRIPTS

        print(SCRIPTS[options.completion])
        return 0
    if options.complete is not None:
        from spd_launch.completion import candidates

        print("\n".join(candidates(options.complete)))
        return 0
    if any(argument.lstrip("+").startswith("pipeline=") for argument in options.overrides):
        from spd_launch.pipeline import launch_pipeline

        _say_cluster(any(o.startswith("cluster=") for o in options.overrides))
        return launch_pipeline(options.overrides, start)
    composed = compose(options.overrides, options.multirun)
    _say_cluster(all("cluster" in run.overrides for run in composed))
    if options.cfg:
        return _show_config(composed)
    return launch(composed)


def _parser() -> argparse.ArgumentParser:
    epilog = "\n\n".join([
        f"experiments: {', '.join(experiment_names())}\nclusters:    {', '.join(cluster_names())}\n"
        f"sweeps:      {', '.join(sweep_names())}",
        EXAMPLES,
    ])  # fmt: skip
    parser = argparse.ArgumentParser(
        "spd_launch", USAGE, "Decompose a network: here, or on a cluster.", epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", help="Hydra overrides, such as seed=1 or train.lr.start=1e-3"
    )
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="run every value of a=1,2 lists"
    )
    parser.add_argument("--cfg", choices=["job"], help="print the composed config and do nothing")
    parser.add_argument(
        "--completion", choices=["bash", "zsh"], help="print what the shell needs to complete words"
    )
    parser.add_argument("--complete", metavar="WORD", help=argparse.SUPPRESS)
    return parser


def _say_cluster(chosen: bool) -> None:
    why = "sbatch is on the PATH, so it goes to Slurm (cluster=local runs here)"
    if default_cluster() == "local":
        why = "no sbatch on the PATH, so it runs here"
    if not chosen:
        print(f"cluster={default_cluster()}: {why}", file=sys.stderr)


def _show_config(composed: list[Composed]) -> int:
    import yaml

    print("---\n".join(yaml.safe_dump(run.values, sort_keys=False) for run in composed), end="")
    return 0


def launch(composed: list[Composed]) -> int:
    """Validate every run, then send all of them or none."""
    from spd_core.targets.store import target_name
    from spd_launch.done import leave_out_done
    from spd_launch.freeze import record
    from spd_launch.inputs import check_inputs
    from spd_launch.ledger import all_or_nothing, new_launch, read_rows, stored_targets
    from spd_launch.plan import make_plan, step_tasks
    from spd_launch.snapshot import code_for
    from spd_launch.validate import validate_all

    runs = validate_all(composed)
    options = runs[0][1].launch
    runs, done = leave_out_done(runs, print)
    if not runs:
        print("nothing to do")
        return 0
    plan = make_plan(runs, "DRYRUN", "0000", stored_targets(runs))
    if options.dry_run and plan.tasks:
        from spd_launch.dry_run import show

        return show(plan)
    if not options.dry_run:
        for config in {target_name(config): config for _, config in runs}.values():
            check_inputs(config)
        _take_targets([config for _, config in runs])
    if not plan.tasks:
        print(f"nothing to do: every target is in {options.out_dir / 'targets'}")
        return 0
    plan, folder = new_launch(runs)
    with all_or_nothing(folder, plan):
        code = code_for(options, folder.code, plan.launch_id)
        record(folder, plan, code, done)
        steps = [row for row in read_rows(folder) if row.goal in STEPS]
        tasks = plan.tasks + step_tasks(steps, {t.run_id: t.config for t in plan.tasks})
        return start(folder, tasks, plan.cluster.kind, code.python_path)


def _take_targets(configs) -> None:
    """Put targets of other runs into the store, so that a wrong reference shows before any job."""
    configs = [c for c in configs if c.target.kind != "custom" and c.target.from_run is not None]
    if not configs:
        return
    import torch
    from rich.console import Console

    from spd_core.distributed import Dist
    from spd_core.targets.train_target import train_target

    here, console = Dist(0, 1, torch.device("cpu")), Console(stderr=True)
    for config in configs:
        try:
            train_target(config, config.launch.out_dir / "targets", here, console, lambda _: False)
        except ValueError as error:
            raise LaunchError(str(error)) from None


def start(folder, tasks, kind: str, python_path: Path) -> int:
    """Run here or submit; says how to follow, resume and cancel."""
    from spd_launch.plan import in_words

    waits = tasks[0].config.launch.wait
    if kind == "local":
        from spd_launch.local import run_here

        print(f"launch {folder.launch_id}: {in_words(tasks)} here", flush=True)
        code = run_here(folder, tasks, python_path)
        if waits:
            from spd_launch.status import look, print_launch

            print_launch(folder, look(folder))
        elif code:
            print(f"not finished; continue with: python -m spd_launch.resume {folder.launch_id}")
        elif tasks[0].config.launch.pack > 1:  # else each run has printed its own
            print(f"results: python -m spd_launch.results {folder.launch_id}")
        return code
    from spd_launch.submit import submit

    jobs = submit(folder, tasks, python_path)
    ids = sorted({job.split("_")[0] for job in jobs.values()}, key=int)
    print(f"launch  {folder.launch_id}: {in_words(tasks)}, job {' '.join(ids)}")
    print(f"logs    {folder.logs}")
    for verb in ("status", "logs", "resume", "cancel"):
        follow = " -f" if verb == "logs" else ""
        print(f"{verb:8}python -m spd_launch.{verb} {folder.launch_id}{follow}")
    if waits:
        from spd_launch.wait import wait

        return wait(folder)
    return 0


if __name__ == "__main__":
    exit_with(main)
