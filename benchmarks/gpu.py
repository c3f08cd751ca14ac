"""The step on one GPU, in every way that it can be taken, against the naive one.

    python -m benchmarks.gpu [--only CASE ...] [--how WAY ...] [--steps N]

Ways: `naive` (benchmarks/naive.py, but for random numbers, which are compiled), the core with
train.compile=off, default and max (a CUDA graph), and `halves`, max in two microbatches. They are
measured one after the other in one process, in five blocks of steps each. Adds to
benchmarks/results/gpu.json as it goes.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.naive import naive_step
from benchmarks.step import composed, with_random_target
from spd_core.distributed import Dist
from spd_core.fast.graph import StepGraph
from spd_core.step import optimisation_step
from spd_core.train import build_optimizer

How = Literal["naive", "off", "default", "max", "halves"]
HOW: tuple[How, ...] = ("naive", "off", "default", "max", "halves")
LLAMA = ["data=stories", "data.seq_len=512", "train.batch_size=16"]
CASES = {
    "tms_5-2": ("tms_5-2", []),
    "tms_40-10": ("tms_40-10", []),
    "resid_mlp2": ("resid_mlp2", []),
    "resid_mlp3": ("resid_mlp3", []),
    "ss_llama_simple": ("ss_llama_simple", LLAMA),
    "ss_llama_simple, bf16": ("ss_llama_simple", [*LLAMA, "train.autocast=bf16"]),
}
RESULTS = Path(__file__).parent / "results" / "gpu.json"
N_BLOCKS, N_WARMUP = 5, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--how", nargs="+", choices=HOW, default=list(HOW))
    parser.add_argument("--steps", type=int, default=20, help="steps of a block")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; `just bench` measures on the CPU")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in track(given.only, "cases"):
        experiment, overrides = CASES[case]
        for how in given.how:
            found = measure(experiment, overrides, how, given.steps)
            results.setdefault(case, {})[how] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    title = f"ms a step (peak MiB), {torch.cuda.get_device_name()}"
    shown = Table("case", *given.how, title=title, title_justify="left")
    for case in given.only:
        each = (results[case][how] for how in given.how)
        shown.add_row(case, *(f"{r['s'] * 1e3:.2f} ({r['peak_mib']:.0f})" for r in each))
    Console(width=120).print(shown)
    print(f"written to {RESULTS}; docs/performance.md says where the time goes")


def measure(experiment: str, overrides: list[str], how: How, steps: int) -> dict[str, float]:
    """Median seconds a step over blocks, peak MiB, and the seconds of the first steps."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    stance, started = "force_eager" if how == "off" else "default", time.perf_counter()
    with torch.compiler.set_stance(stance):
        take_step, seconds = make_step(experiment, overrides, how), []
        for step in range(N_WARMUP):
            take_step(step)
        torch.cuda.synchronize()
        first = time.perf_counter() - started
        for block in range(N_BLOCKS):
            started = time.perf_counter()
            for i in range(steps):
                take_step(N_WARMUP + block * steps + i)
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - started) / steps)
    peak = torch.cuda.max_memory_allocated() / 2**20
    return {"s": statistics.median(seconds), "peak_mib": round(peak), "first_s": round(first, 1)}


def make_step(experiment: str, overrides: list[str], how: How) -> Callable[[int], object]:
    config, data = composed(experiment, overrides)
    if how == "halves":
        half = f"train.microbatch_size={config.train.batch_size // 2}"
        config, data = composed(experiment, [*overrides, half])
    d = with_random_target(config, data, Dist(0, 1, torch.device("cuda")))
    match how:
        case "naive":
            naive = torch.optim.AdamW(d.model.parameters(), weight_decay=0.0)
            return lambda step: naive_step(config, d.model, data, naive, step)
        case "off" | "default":
            optimizer = build_optimizer(config, d.model)
            return lambda step: optimisation_step(d, optimizer, step, step, lambda _batch: {})
        case "max" | "halves":
            graph = StepGraph(d, build_optimizer(config, d.model), lambda _batch, _logged: {})
            return lambda step: graph(step, step, False)


if __name__ == "__main__":
    main()
