"""Time one optimisation step: data in, optimiser out, after warm-up.

python -m benchmarks.step --experiment tms_5-2 [--batch N] [--steps N]
    [--device cpu|cuda] [--threads N] [--dp N] [FIELD=VALUE ...]

With --dp the ranks are processes of this machine; rank 0's times are printed.
"""

import argparse
import json
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Literal

import torch
from torch.multiprocessing.spawn import spawn

from spd_core import distributed
from spd_core.component_model import ComponentModel
from spd_core.config import RunConfig, config_digest
from spd_core.data.batches import Decomposition
from spd_core.randomness import stream
from spd_core.step import optimisation_step
from spd_core.targets.train_target import untrained_target
from spd_core.train import build_optimizer
from spd_launch.compose import compose
from spd_launch.config import run_config
from spd_launch.ports import free_port
from spd_launch.task import TUNING
from spd_launch.validate import validate

N_WARMUP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--batch", type=int, help="batch size; the experiment's where absent")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a rank")
    parser.add_argument("--dp", type=int, default=1, help="data-parallel processes")
    parser.add_argument("overrides", nargs="*", help="of the experiment: train.autocast=bf16")
    arguments = parser.parse_args()
    overrides = arguments.overrides
    if arguments.batch is not None:
        overrides = [*overrides, f"train.batch_size={arguments.batch}"]
    config, data = composed(arguments.experiment, [*overrides, f"dp={arguments.dp}"])
    port = free_port(f"step-{os.getpid()}", 0)
    shared = (config, data, arguments.steps, arguments.device, arguments.threads, port)
    os.environ.update(TUNING)  # read as a process starts, so one rank is a process of its own too
    spawn(run_rank, shared, nprocs=arguments.dp)


def composed(experiment: str, overrides: list[str]) -> tuple[RunConfig, Path]:
    """The config of a local run, and where its corpora lie."""
    words = [f"+experiment={experiment}", "cluster=local", *overrides]
    job = validate(compose(words, multirun=False)[0].values)
    return run_config(job), job.launch.out_dir / "data"


def with_random_target(config: RunConfig, data: Path, dist: distributed.Dist) -> Decomposition:
    """A decomposition at its start, of a random target of the experiment's shape."""
    target = untrained_target(config, data, stream(0, "benchmark", device=torch.device("cpu")))
    model = ComponentModel(target, config.decompose, config.seed).to(dist.device)
    return Decomposition(config, model, dist, data)


def run_rank(
    rank: int,
    config: RunConfig,
    data: Path,
    steps: int,
    device: Literal["cpu", "cuda"],
    n_threads: int,
    port: int,
) -> None:
    """Measure on one rank; rank 0 prints the JSON line."""
    torch.set_num_threads(n_threads)
    dist = distributed.init(rank, config.dp, rank, f"127.0.0.1:{port}", device)
    result = measure(config, data, steps, dist)
    if dist.is_main:
        print(json.dumps(result))
    distributed.shutdown()


def measure(
    config: RunConfig, data: Path, steps: int, dist: distributed.Dist
) -> dict[str, float | int | str]:
    """Times of the step on a random target of the experiment's shape."""
    d = with_random_target(config, data, dist)
    optimizer = build_optimizer(config, d.model)
    for step in range(N_WARMUP):
        optimisation_step(d, optimizer, step, step, lambda _batch: {})
    seconds = []
    for step in range(N_WARMUP, N_WARMUP + steps):
        _synchronise(dist)
        started = time.perf_counter()
        optimisation_step(d, optimizer, step, step, lambda _batch: {})
        _synchronise(dist)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return {
        "experiment": config.experiment,
        "median_s": median,
        "min_s": min(seconds),
        "p90_s": statistics.quantiles(seconds, n=10)[-1],
        "peak_mib": _peak_mib(dist),
        "tokens_or_examples_per_s": config.train.batch_size / median,
        "n_params": sum(p.numel() for p in d.model.trained_parameters().values()),
        "torch": torch.__version__,
        "device": str(dist.device),
        "dp": config.dp,
        "n_threads": torch.get_num_threads(),
        "config_digest": config_digest(config),
    }


def _synchronise(dist: distributed.Dist) -> None:
    if dist.device.type == "cuda":
        torch.cuda.synchronize()


def _peak_mib(dist: distributed.Dist) -> float:
    if dist.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
