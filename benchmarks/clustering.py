"""What an iteration of clustering takes.

    python -m benchmarks.clustering --alive N [--samples N] [--density P] [--iters N] [override ...]

Random activations: every subcomponent fires on its own share of samples, `density` on average, and
one of a hundred nearly always. Prints one JSON line; times in seconds.
"""

import argparse
import json
import resource
import time

import numpy as np

from spd_analysis.clustering.activations import Activations
from spd_analysis.clustering.config import DEFAULT, load_config
from spd_analysis.clustering.merge import cluster


def random_activations(n: int, n_samples: int, density: float) -> Activations:
    rng = np.random.default_rng(0)
    probability = rng.exponential(density, n).clip(max=1).astype(np.float32)
    probability[::100] = 0.9
    words = np.zeros((-(-n_samples // 64), n), np.uint64)
    for bit in range(64):
        active = rng.random(words.shape, dtype=np.float32) < probability
        words |= active.astype(np.uint64) << np.uint64(bit)
    return Activations("binary", words, 64 * len(words), [f"m:{i}" for i in range(n)], 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alive", type=int, required=True, help="subcomponents")
    parser.add_argument("--samples", type=int, default=65536)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--iters", type=int, default=100)
    parser.add_argument("overrides", nargs="*", help="of the clustering's config")
    options = parser.parse_args()
    config = load_config(DEFAULT, [*options.overrides, f"iters={options.iters}"])
    activations = random_activations(options.alive, options.samples, options.density)
    moments, cpu = [time.perf_counter()], [time.process_time()]

    def after_iteration(_k: int) -> None:
        moments.append(time.perf_counter())
        cpu.append(time.process_time())

    cluster(activations, config, after_iteration)
    times, cpu_times = np.diff(moments)[1:], np.diff(cpu)[1:]  # the first holds the start
    print(json.dumps({
        "alive": options.alive, "samples": activations.n_samples, "density": options.density,
        "iters": options.iters, "draw": config.draw.model_dump(),
        "pop_component_prob": config.pop_component_prob,
        "start_s": round(moments[1] - moments[0], 2),
        "median_s": round(float(np.median(times)), 5),
        "p90_s": round(float(np.quantile(times, 0.9)), 5),
        "max_s": round(float(times.max()), 5),
        "median_cpu_s": round(float(np.median(cpu_times)), 5),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
