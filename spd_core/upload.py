"""A run's folder, sent to W&B: values, figures, and in the end the files that `load_run` needs.

    python -m spd_core.upload RUN_DIR

sends what W&B does not have yet. A run that is tracked in W&B starts this beside itself, where it
can hold nothing up, with the step that it continues from as a second word: then the folder is
followed until stdin is closed, which is when training ends, however it does.
"""

import json
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spd_core.config import RunConfig, load_config
from spd_core.run_dir import RunDir, read_status

POLL_S = 1.0
LAST_S = 120  # for the rest, where training was killed and nobody waits


def upload(run_dir: RunDir, from_step: int | None) -> None:
    """Send the run; with `from_step`, follow it, and in the mode that its config says."""
    import wandb  # takes seconds, and planning imports this package

    config = load_config(run_dir.config_file)
    options = config.track.wandb.model_dump()
    if from_step is None:
        options["mode"] = "online"
    name, values = run_dir.path.name, config.model_dump(mode="json")
    options |= {"id": name, "name": name, "dir": str(run_dir.path), "config": values}
    quiet = wandb.Settings(show_info=False, quiet=True, console="off")
    run = wandb.init(**options, resume="allow", settings=quiet)
    offline = f"offline, `wandb sync {run.settings.sync_dir}` uploads it"
    print(f"W&B: {offline if run.offline else run.url}", flush=True)
    # Offline, W&B does not know what it kept of a run that continues.
    first = (from_step or 0) + 1 if run.offline else run.starting_step
    for record in _records(run_dir, follow=from_step is not None):
        if (step := record["step"]) < first:
            continue
        # `step` also as a value: W&B numbers anew what a run that continues offline logs.
        values = {key: value for key, value in record.items() if key != "time"}
        if any(key.startswith("eval") for key in record):  # so its figures are drawn
            for png in sorted(run_dir.figures.glob(f"step_{step}/*.png")):
                values[f"figures/{png.stem}"] = wandb.Image(str(png))
        run.log(values, step=step)
    status = read_status(run_dir)
    assert status is not None
    if status.state == "finished":
        _save_files(run, run_dir, config)
    run.finish(exit_code=0 if status.state in ("finished", "stopped") else 1)


def _records(run_dir: RunDir, follow: bool) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl, with those to come until stdin is closed."""
    rest, ended = "", not follow
    with open(run_dir.metrics_file) as file:
        while True:
            *lines, rest = (rest + file.read()).split("\n")  # the rest is being written
            yield from map(json.loads, lines)
            if ended:
                return
            if select.select([sys.stdin], [], [], POLL_S)[0]:
                ended = True
                signal.alarm(LAST_S)


def _save_files(run: Any, run_dir: RunDir, config: RunConfig) -> None:
    """Upload what `load_run` needs, under its place below the folder of outputs."""
    from spd_core.load import files_to_load  # imports torch: not beside training

    for name, path in files_to_load(run_dir, config).items():
        link = Path(run.dir, name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve(strict=True))
        run.save(link, base_path=run.dir, policy="now")


if __name__ == "__main__":
    path, *step = sys.argv[1:]
    if step:  # beside the training, and its signals are not meant for this
        os.nice(10)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
    upload(RunDir(Path(path).absolute()), int(step[0]) if step else None)
