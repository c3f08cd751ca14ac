"""What tests use of the running cluster. Not in conftest.py: that name is not unique to import."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from slurm_cluster import wait_for

__all__ = ["Cluster", "wait_for"]


@dataclass(frozen=True)
class Cluster:
    conf: Path
    nodes: list[str]

    def run(self, *command: str | Path, timeout_s: float = 60) -> str:
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
