"""What it costs a run that it can be killed and continued: checkpoints, and what is done each step.

python -m benchmarks.overhead --experiment resid_mlp2 [--batch N] [--steps N] [--every N]

One process. Prints a JSON line. Shares are of the CPU time of `every` steps, which other programs
on the machine change least; the writer's time counts in full, though training goes on meanwhile.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.step import composed, with_random_target
from spd_core.checkpoint import save_checkpoint, training_state
from spd_core.config import CheckpointConfig, RunConfig
from spd_core.distributed import Dist
from spd_core.fast.overlap import AnyRank
from spd_core.run_dir import RunDir
from spd_core.step import optimisation_step
from spd_core.train import build_optimizer
from spd_launch.progress import HEARTBEAT_S, Heartbeat
from spd_launch.task import Stop

N_CHECKPOINTS, N_TOLD, N_HEARTBEATS = 5, 10_000, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--batch", type=int, help="batch size; the experiment's where absent")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    given = parser.parse_args()
    overrides = [] if given.batch is None else [f"train.batch_size={given.batch}"]
    config, _ = composed(given.experiment, overrides)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on the disk that results are on
        run_dir = RunDir(Path(folder) / "runs" / "run")
        run_dir.path.mkdir(parents=True)
        run_dir.metrics_file.touch()
        print(json.dumps(measure(config, run_dir, given.steps, given.every)))


def measure(config: RunConfig, run_dir: RunDir, steps: int, every: int) -> dict[str, float | str]:
    """Steps, then checkpoints of what they made, then what each step asks and tells."""
    here = Dist(0, 1, torch.device("cpu"))
    d = with_random_target(config, run_dir.data, here)
    optimizer = build_optimizer(config, d.model)
    step_s, step_cpu_s = [], []
    for step in range(steps + 2):
        started, cpu = time.perf_counter(), time.process_time()
        optimisation_step(d, optimizer, step, step, lambda _batch: {})
        step_s.append(time.perf_counter() - started)
        step_cpu_s.append(time.process_time() - cpu)
    copied_s, written_s, checkpoint_cpu_s, state = [], [], [], {}
    options = CheckpointConfig(every_steps=every, keep=2, keep_every=None)
    for step in range(1, N_CHECKPOINTS + 1):
        started, cpu = time.perf_counter(), time.process_time()
        state = training_state(d.model, optimizer, {})
        copied_s.append(time.perf_counter() - started)
        save_checkpoint(run_dir, step, state, options)
        written_s.append(time.perf_counter() - started - copied_s[-1])
        checkpoint_cpu_s.append(time.process_time() - cpu)
    told_s, heartbeat_s = per_step(run_dir, here)
    usual, usual_cpu = statistics.median(step_s[2:]), statistics.median(step_cpu_s[2:])
    checkpoint_cpu = statistics.median(checkpoint_cpu_s)
    return {
        "experiment": config.experiment,
        "step_s": usual,
        "step_cpu_s": usual_cpu,
        "checkpoint_mib": sum(t.nbytes for t in state.values()) / 2**20,
        "training_waits_s": statistics.median(copied_s),
        "written_beside_it_s": statistics.median(written_s),
        "checkpoint_cpu_s": checkpoint_cpu,
        "checkpoint_percent": 100 * checkpoint_cpu / (every * usual_cpu),
        "signals_and_heartbeat_percent": 100 * (told_s / usual + heartbeat_s / HEARTBEAT_S),
    }


def per_step(run_dir: RunDir, dist: Dist) -> tuple[float, float]:
    """Seconds of one step's question whether to stop, and of one heartbeat that is written."""
    heartbeat, stop, on_any_rank = Heartbeat(run_dir, N_TOLD, 1, "benchmark"), Stop(), AnyRank(dist)
    heartbeat.at(0)
    started = time.perf_counter()
    for step in range(N_TOLD):
        heartbeat.at(step)
        on_any_rank(stop())
    told_s = (time.perf_counter() - started) / N_TOLD
    started = time.perf_counter()
    for _ in range(N_HEARTBEATS):
        heartbeat.write("running")
    return told_s, (time.perf_counter() - started) / N_HEARTBEATS


if __name__ == "__main__":
    main()
