"""A run's folder, sent to W&B: values, figures, and in the end the files that `load_run` needs.

    python -m spd_launch.upload RUN      (its folder, its id in $SPD_OUT_DIR, or its name)

sends what W&B does not have yet. Beside a run that is tracked in W&B, a process of its own sends
the folder as it grows, where W&B can hold nothing up: until its stdin is closed, which is when
training ends, however it does.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

from spd_core.config import RunConfig, load_config, named_run
from spd_core.run_dir import RunDir, write_atomic
from spd_launch import ledger
from spd_launch.errors import LaunchError, exit_with
from spd_launch.run_record import WANDB_URL, read_status

POLL_S = 1.0
# Seconds that W&B has in the end; less where a run was told to stop, before its time limit; and
# where it was killed, so that nobody waits.
FINISH_S, STOP_S, KILLED_S = 70, 20, 120


@contextmanager
def uploading(config: RunConfig, run_dir: RunDir) -> Iterator[None]:
    """While a run trains, W&B follows its folder; what fails in that only warns.

    Raises:
        LaunchError: W&B is asked for, but not installed.
    """
    mode = config.track.wandb.mode
    if mode == "disabled":
        yield
        return
    if find_spec("wandb") is None:
        raise LaunchError(
            f"track.wandb.mode={mode} needs W&B, which is not installed: "
            "run `pip install wandb`, or set track.wandb.mode=disabled"
        )
    saved = (int(p.name.removeprefix("step_")) for p in run_dir.checkpoints.glob("step_*"))
    command = [sys.executable, "-m", "spd_launch.upload", run_dir.path, str(max(saved, default=0))]
    # Its reports about errors hold up the exit; whose memory and GPU it shows; which code runs.
    env = {"WANDB_ERROR_REPORTING": "false", "WANDB__STATS_PID": str(os.getpid()), **os.environ}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    env.pop("WANDB_SERVICE", None)  # another run's server, if this process has one: not for us
    with open(run_dir.path / "upload.log", "wb") as log:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stderr=log, start_new_session=True
        )
    assert process.stdin is not None
    try:
        yield
    finally:
        process.stdin.close()
        limit_s = FINISH_S if _state(run_dir) == "finished" else STOP_S
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            _warn(run_dir, f"no answer within {limit_s} s")


def upload(config: RunConfig, run_dir: RunDir, from_step: int | None) -> None:
    """Send the run; with `from_step` follow it from there on, in the mode of its config."""
    import wandb  # takes seconds, and this file is imported where W&B is not wanted

    options = config.track.wandb.model_dump()
    options["group"] = options["group"] or _launch_id(run_dir)
    if from_step is None:
        options["mode"] = "online"
    run = wandb.init(
        **options,
        id=run_dir.path.name,
        name=run_dir.path.name,
        resume="allow",
        dir=str(run_dir.path),
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(show_info=False, quiet=True, console="off"),
    )
    offline = f"offline, `wandb sync {run.settings.sync_dir}` uploads it"
    print(f"W&B: {offline if run.offline else run.url}", flush=True)
    if not run.offline:
        write_atomic(run_dir.path / WANDB_URL, f"{run.url}\n")
        if "SPD_LAUNCH" in os.environ:
            _tell_launch(Path(os.environ["SPD_LAUNCH"]), str(run.url))
    # Offline, W&B does not know what it kept of a run that continues.
    first = (from_step or 0) + 1 if run.offline else run.starting_step
    for record in _records(run_dir.metrics_file, follow=from_step is not None):
        if record["step"] < first:
            continue
        first = record["step"]
        # `step` also as a value: W&B numbers anew what a run that continues offline logs.
        values = {key: value for key, value in record.items() if key != "time"}
        if any(key.startswith("eval") for key in record):  # so its figures are drawn
            for png in sorted(run_dir.figures.glob(f"step_{first}/*.png")):
                values[f"figures/{png.stem}"] = wandb.Image(str(png))
        run.log(values, step=first)
    if _state(run_dir) == "finished":
        _save_files(run, run_dir, config)
    run.finish(exit_code=0 if _state(run_dir) in ("finished", "stopped") else 1)


def _launch_id(run_dir: RunDir) -> str | None:
    """Of the launch that trains the run: W&B shows its runs together, unless the user groups them.

    A run that somebody copied here has none.
    """
    if "SPD_LAUNCH" in os.environ:
        return Path(os.environ["SPD_LAUNCH"]).name
    with suppress(LaunchError):
        return ledger.find(str(run_dir.path), run_dir.path.parent.parent)[0].launch_id
    return None


def _tell_launch(launch: Path, url: str) -> None:
    """The run's URL becomes its job's comment; the first of several runs saves a view of them."""
    if "SLURM_JOB_ID" in os.environ:
        from spd_launch import slurm_state
        from spd_launch.task import place_from_environment

        try:
            job_id = place_from_environment("slurm").job_id
            slurm_state.change_comment(job_id, launch.name, url)
        except (LaunchError, subprocess.TimeoutExpired) as error:
            print(f"the job keeps its comment: {error}", flush=True)
    if find_spec("wandb_workspaces") is not None:
        words = [launch.name, "--once", "--out-dir", str(launch.parent.parent)]
        # It takes seconds, for which the run's values need not wait.
        subprocess.Popen([sys.executable, "-m", "spd_launch.workspace", *words], stdin=DEVNULL)


def _records(metrics_file: Path, follow: bool) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl, with those to come until stdin is closed."""
    inode, position, ended = 0, 0, not follow
    while True:
        with suppress(FileNotFoundError), open(metrics_file, "rb") as file:
            if os.fstat(file.fileno()).st_ino != inode:  # a run that continues cuts it
                inode, position = os.fstat(file.fileno()).st_ino, 0
            file.seek(position)
            for line in file:
                if line.endswith(b"\n"):  # else it is being written
                    position += len(line)
                    yield json.loads(line)
        if ended:
            return
        if select.select([sys.stdin], [], [], POLL_S)[0]:
            ended = True
            signal.alarm(KILLED_S)


def _save_files(run: Any, run_dir: RunDir, config: RunConfig) -> None:
    for name, path in files_to_load(run_dir, config).items():
        link = Path(run.dir, name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve(strict=True))
        run.save(link, base_path=run.dir, policy="now")


def files_to_load(run_dir: RunDir, config: RunConfig) -> dict[str, Path]:
    """All that `spd_core.load_run` needs of a run, by its place below a folder of outputs."""
    from spd_core.checkpoint import newest_valid_checkpoint  # imports torch: not beside training
    from spd_core.targets.train_target import target_folder

    paths = [run_dir.config_file, *newest_valid_checkpoint(run_dir)[0].iterdir()]
    if config.target.kind != "custom":
        paths += target_folder(config, run_dir.targets).iterdir()
    root = run_dir.path.parent.parent
    return {str(path.relative_to(root)): path for path in paths}


def _state(run_dir: RunDir) -> str:
    status = read_status(run_dir)
    assert status is not None
    return status.state


def _warn(run_dir: RunDir, problem: str) -> None:
    print(
        f"W&B failed: {problem}\nAll values are in {run_dir.metrics_file}; "
        f"`python -m spd_launch.upload {run_dir.path}` uploads what is missing.",
        flush=True,
    )


def _find(reference: str) -> RunDir:
    """The run's folder: given itself, by its id in the folder of outputs, or its name."""
    run = named_run(reference)
    by_id = RunDir(Path(os.environ.get("SPD_OUT_DIR", "outputs"), "runs", run).absolute())
    return by_id if by_id.config_file.is_file() else RunDir(Path(run).absolute())


def main() -> int:
    if len(sys.argv) not in (2, 3):
        raise LaunchError("usage: python -m spd_launch.upload RUN    (its folder, id or name)")
    step = None
    try:
        run_dir = _find(sys.argv[1])
        config = load_config(run_dir.config_file)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    if len(sys.argv) == 3:
        step = int(sys.argv[2])
        os.nice(10)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # they are for the training, whose end ends this
    try:
        upload(config, run_dir, step)
    except Exception as error:
        _warn(run_dir, f"{type(error).__name__}: {error}")
        raise
    return 0


if __name__ == "__main__":
    exit_with(main)
