"""One step that follows the runs (`launch.then`), in its job or here: what it needs, its command.

    python -m spd_launch.then LAUNCH_FOLDER NAME      NAME as `status` shows it: STEP[-RUN_ID]

A step is started anew where it was preempted, so it needs no checkpoint.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from spd_launch import ledger
from spd_launch.errors import LaunchError, exit_with
from spd_launch.ledger import LaunchDir
from spd_launch.preflight import check_code, drop_half_result
from spd_launch.progress import Heartbeat
from spd_launch.run_record import read_status
from spd_launch.steps import Row, step_command
from spd_launch.task import STOPPED, Stop, place_from_environment

LATE_S, LOOK_S = 65.0, 5.0  # NFS keeps what it knows of a file and its folder for up to 60 s


def run(launch_path: str, name: str) -> None:
    """Run the command of one step.

    Raises:
        LaunchError: the runs that it needs have not finished, or its command failed.
    """
    stop = Stop()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the time limit is near: no use to a step
    os.umask(0o002)
    check_code()
    drop_half_result()
    launch = LaunchDir(Path(launch_path))
    row = ledger.find_row(ledger.read_rows(launch), name)
    place = place_from_environment(ledger.read_info(launch)["kind"])
    folder = launch.folder(row)
    folder.path.mkdir(parents=True, exist_ok=True)
    old = read_status(folder)
    heartbeat = Heartbeat(folder, 1, 1 + (old.attempt if old else 0), place.job_id)
    heartbeat.write("running")
    try:
        late_s = 0 if place.job_id.startswith("local") else LATE_S
        if problem := still_unmet(launch, row, late_s):
            raise LaunchError(problem)
        code, last_line = _command(launch, row)
        if code and not stop():
            raise LaunchError(f"its command ended with code {code}: {last_line}")
    except LaunchError as error:
        ledger.mark_failed(folder, error)
        raise
    if stop():
        heartbeat.write("stopped")
        if place.job_id.startswith("local"):
            sys.exit(STOPPED)
        time.sleep(3600)  # who exits now counts as ended, and is not started again by Slurm
    heartbeat.step = 1
    heartbeat.write("finished")


def still_unmet(launch: LaunchDir, row: Row, late_s: float) -> str | None:
    """`unmet`, asked again for so many seconds: a network file system may show files late."""
    deadline = time.monotonic() + late_s
    while (problem := unmet(launch, row)) and time.monotonic() < deadline:
        print(f"{problem}; looking again", flush=True)
        time.sleep(LOOK_S)
    return problem


def unmet(launch: LaunchDir, row: Row) -> str | None:
    """Why a step cannot start yet: the runs and earlier steps that it needs; None where it can."""
    info, rows = ledger.read_info(launch), ledger.read_rows(launch)
    runs = [other for other in rows if other.goal == "decomposition"]
    if row.after is not None:
        runs = [other for other in runs if other.name == row.after]
    earlier = info["then"][: info["then"].index(row.goal)]
    steps = [other for other in rows if other.goal in earlier]
    if row.after is not None:
        steps = [other for other in steps if other.after == row.after]
    if row.after is None and info["then_needs"] == "any":
        n_needed, needed = 1, runs
    else:
        n_needed, needed = len(runs + steps), runs + steps
    statuses = [(other, read_status(launch.folder(other))) for other in needed]
    missing = [o.name for o, status in statuses if status is None or status.state != "finished"]
    if len(needed) - len(missing) >= n_needed:
        return None
    return f"{row.name} needs {n_needed} of {len(needed)}; not finished: {', '.join(missing)}"


def _command(launch: LaunchDir, row: Row) -> tuple[int, str]:
    """Its exit code, and the last line of what it had to complain about."""
    folder = launch.path if row.after is None else launch.run_dir(row.after).path
    parts = ledger.read_info(launch)["parts"]
    command = ["-m", *step_command(row, folder, parts)]
    print("$ python " + shlex.join(command), flush=True)
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # it is no rank of anything
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env["SPD_OUT_DIR"] = str(launch.path.parent.parent)
    last_line = ""
    with subprocess.Popen(
        [sys.executable, *command], env=env, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            last_line = line.strip() or last_line
    return process.returncode, last_line


def main() -> int:
    if len(sys.argv) != 3:
        raise LaunchError("usage: python -m spd_launch.then LAUNCH_FOLDER NAME")
    run(sys.argv[1], sys.argv[2])
    return 0


if __name__ == "__main__":
    exit_with(main)
