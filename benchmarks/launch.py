"""What a launch costs.

    python -m benchmarks.launch --tasks N [--dry] [--cluster NAME] [override ...]

Prints one JSON line; times in seconds. Without --dry the tasks are really submitted, held, and then
cancelled, so it needs a Slurm.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from spd_launch.compose import PACKAGE_ROOT, compose
from spd_launch.errors import exit_with
from spd_launch.freeze import record
from spd_launch.ledger import new_launch
from spd_launch.slurm_state import cancel_jobs
from spd_launch.snapshot import code_for, drop_snapshot
from spd_launch.submit import submit
from spd_launch.validate import validate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, required=True)
    parser.add_argument("--dry", action="store_true", help="everything but the submission")
    parser.add_argument("--cluster", default="cpu")
    parser.add_argument(
        "--out-dir", type=Path, help="where the jobs' nodes can see it; default a temporary folder"
    )
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="spd-bench-", dir=options.out_dir) as folder:
        print(json.dumps(measure(options, Path(folder))))
    return 0


def measure(options: argparse.Namespace, out_dir: Path) -> dict[str, float | int]:
    times: dict[str, float] = {}
    arguments = [
        "+experiment=tms_5-2", f"cluster={options.cluster}", f"seed=range(0,{options.tasks})",
        f"launch.out_dir='{out_dir}'", "+cluster.sbatch.hold=true", *options.overrides,
    ]  # fmt: skip
    start = time.perf_counter()
    with _timed(times, "compose_s"):
        composed = compose(arguments, multirun=True)
    with _timed(times, "validate_s"):
        runs = [(run.overrides, validate(run.values)) for run in composed]
    with _timed(times, "plan_s"):
        plan, launch = new_launch(runs)
    with _timed(times, "snapshot_s"):
        code = code_for(runs[0][1].launch, launch.code, plan.launch_id)
    with _timed(times, "record_s"):
        record(launch, plan, code, [])
    with _timed(times, "submit_s"):
        jobs = {} if options.dry else submit(launch, plan.tasks, code.python_path)
    times["total_s"] = time.perf_counter() - start
    arrays = {job.split("_")[0] for job in jobs.values()}
    cancel_jobs(sorted(arrays))
    drop_snapshot(PACKAGE_ROOT, plan.launch_id)
    return {"tasks": len(plan.tasks), **{k: round(v, 4) for k, v in times.items()}} | {
        "sbatch_calls": len(arrays),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


@contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times[name] = time.perf_counter() - start


if __name__ == "__main__":
    exit_with(main)
