"""What tests use of the running cluster. Not in conftest.py: that name is not unique to import."""

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import CTL, wait_for

from spd_launch.ledger import LaunchDir
from spd_launch.plan import Task
from spd_launch.run_record import Status, read_status

SMALL = [
    "+experiment=tms_5-2", "train.steps=20", "train.batch_size=64",
    "eval.batch_size=64", "eval.steps=1", "eval.every=10", "eval.slow_every=20",
    "track.log_every=10",
    "target.steps=1000", "target.batch_size=512", "cluster=cpu", "cluster.time_min=5",
]  # fmt: skip
NO_FIGURES = [
    f"eval.metrics.{name}=null"
    for name in ("ci_histograms", "component_activation_density", "ci_mean_per_component",
                 "permuted_ci_plots", "uv_plots")
]  # fmt: skip
# Steps that take a second each until a file is there: time to break a run that needs no CPU.
SLOW = """
import time
from pathlib import Path

from spd_core.component_model import ComponentModel
from spd_core.data.batches import Batch
from spd_core.losses.distance import LossParts


def loss(model: ComponentModel, batch: Batch, *, until: str) -> LossParts:
    if batch.randomness.step > 10 and not Path(until).exists():
        time.sleep(1)
    return batch.target_out.sum() * 0, 1
"""
LOSS = """
import time
from pathlib import Path

from spd_core.component_model import ComponentModel
from spd_core.data.batches import Batch
from spd_core.losses.distance import LossParts


def loss(model: ComponentModel, batch: Batch, *, seed: int, without: str, then: str) -> LossParts:
    while seed == 1 and not Path(without).exists():
        if then == "fail":
            raise ArithmeticError("not yet")
        time.sleep(0.1)
    return batch.target_out.sum() * 0, 1
"""
Command = Callable[..., subprocess.CompletedProcess[str]]
Launch = Callable[..., tuple[LaunchDir, list[Task]]]


@dataclass(frozen=True)
class Cluster:
    conf: Path
    nodes: list[str]

    def run(self, *command: str | Path, timeout_s: float = 180) -> str:
        """Run a command on the login host; its standard error is part of any failure."""
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *options: str | Path) -> str:
        """Submit with sbatch and return the job id."""
        return self.run("sbatch", "--parsable", *options).strip().split(";")[0]

    def state(self, job: str) -> str:
        """The job's state, of its latest attempt; works without accounting."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job)
        return shown.split("JobState=")[1].split()[0]

    def controller(self) -> int:
        """Its process id."""
        [found] = [p for p, name in slurm_cluster.running(CTL).items() if name == "slurmctld"]
        return found

    def stop_controller(self) -> None:
        """By SIGTERM: killed, it forgets what came to its ears in the last five seconds."""
        pid = self.controller()
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: pid not in slurm_cluster.running(CTL), 180, "the controller to end")

    def start_controller(self) -> None:
        slurm_cluster.start(CTL, "slurmctld", "-D")
        wait_for(lambda: len(slurm_cluster.node_states()) == 4, 180, "the controller")

    def impatient(self) -> str:
        """A SLURM_CONF with which commands look two seconds for a controller, and not ten."""
        conf = self.conf.with_name("impatient.conf")
        conf.write_text(self.conf.read_text() + "MessageTimeout=2\n")
        return str(conf)

    def tidy(self) -> None:
        """End all jobs, and wait until every node can take new ones."""
        self.run("scancel", "--user=root")
        wait_for(lambda: not self.run("squeue", "-h"), 180, "all jobs to end")
        wait_for(lambda: slurm_cluster.node_states() == ["idle"] * 4, 240, "four idle nodes")


def status(folder: LaunchDir, task: Task) -> Status:
    found = read_status(folder.run_dir(task.run_id))
    assert found is not None
    return found


def log(folder: LaunchDir, rank: int = 0) -> str:
    return "".join(f.read_text() for f in sorted(folder.logs.glob(f"*_{rank}_log.out")))


def wait_until(folder: LaunchDir, task: Task, state: str, seconds: float = 400) -> None:
    try:
        wait_for(
            lambda: status(folder, task).state == state, seconds, f"{task.run_id} to be {state}"
        )
    except TimeoutError:
        pytest.fail(f"{status(folder, task)}\n{log(folder)}")


def until(go: Path, then: str) -> str:
    """The override of a loss that makes seed 1 `wait` for a file, or `fail` without it."""
    own = f"path: stubborn.loss, coeff: 1.0, seed: '${{seed}}', without: '{go}', then: {then}"
    return f"losses.stubborn={{{own}}}"
