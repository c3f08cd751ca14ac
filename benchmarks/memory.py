"""The memory of a language model's step on a GPU, counted on a CPU: peak MiB of its tensors.

    python -m benchmarks.memory [--only CASE ...] [--how WAY ...] [FIELD=VALUE ...]

The step runs as a GPU would take it: chains of operators compiled, no loops of a CPU, no shape that
depends on a number. Ways: `naive` (benchmarks/naive.py), the core with
train.activation_checkpointing=off and ci_fns, and `halves`, the last in two microbatches. Work
space of a GPU's libraries is not in it, and autocast is a CPU's. Each way has a process of its own.
Adds to benchmarks/results/memory.json.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal
from unittest.mock import PropertyMock, patch

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.gpu import LLAMA
from benchmarks.naive import naive_step
from benchmarks.step import composed, with_random_target
from benchmarks.table import RESULTS
from spd_core import ci_fns
from spd_core.data.batches import draw_examples
from spd_core.distributed import Dist
from spd_core.fast import hashed, leaky_hard, masked, native, powers
from spd_core.losses import distance
from spd_core.randomness import StepRandomness
from spd_core.step import descend, scheduled
from spd_core.train import build_optimizer

How = Literal["naive", "off", "ci_fns", "halves"]
HOW: tuple[How, ...] = ("naive", "off", "ci_fns", "halves")
CASES = {"ss_llama_simple": "off", "ss_llama_simple, bf16": "bf16"}
N_WARMUP = 2  # in which AdamW makes its moments, and chains are compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--how", nargs="+", choices=HOW, default=list(HOW))
    parser.add_argument("overrides", nargs="*", help="of the experiment: data.seq_len=256")
    given = parser.parse_args()
    file = RESULTS / "memory.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for case, how in track([(c, h) for c in given.only for h in given.how], "a minute each"):
        overrides = [*LLAMA, f"train.autocast={CASES[case]}", *given.overrides]
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found = process.submit(peak_mib, "ss_llama_simple", overrides, how).result()
        results.setdefault(case, {})[how] = found
        file.write_text(json.dumps(results, indent=1) + "\n")
    shown = Table("peak MiB", *given.how, title=" ".join([*LLAMA, *given.overrides]))
    for case in given.only:
        shown.add_row(case, *(f"{results[case][how]:,}" for how in given.how))
    Console().print(shown)
    print(f"written to {file}; what a GPU holds beside it: docs/performance.md")


def peak_mib(experiment: str, overrides: list[str], how: How) -> int:
    """Peak of one step, weights and moments of AdamW among it."""
    config, _ = composed(experiment, overrides)
    match how:
        case "naive":
            own = []
        case "off" | "ci_fns":
            own = [f"train.activation_checkpointing={how}"]
        case "halves":
            half = config.train.batch_size // 2
            own = ["train.activation_checkpointing=ci_fns", f"train.microbatch_size={half}"]
    config, data = composed(experiment, [*overrides, *own])
    cpu = torch.device("cpu")
    d = with_random_target(config, data, Dist(0, 1, cpu))
    optimizer, batch_size = build_optimizer(config, d.model), config.train.batch_size

    def take_step(step: int) -> None:
        if how == "naive":
            return naive_step(config, d.model, data, optimizer, step)
        randomness = StepRandomness(config.seed, step, 0, 1, batch_size, cpu)
        given = torch.tensor(step), draw_examples(config, data, randomness, "train")
        descend(d, optimizer, step, scheduled(config, step), lambda _: {}, given)

    with as_on_a_gpu():
        for step in range(N_WARMUP):
            take_step(step)
        optimizer.zero_grad()
        with torch.profiler.profile(profile_memory=True) as profile:
            take_step(N_WARMUP)
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(trace := f"{folder}/trace.json")
        events = json.loads(Path(trace).read_text())["traceEvents"]
    memory = [event["args"] for event in events if event.get("name") == "[memory]"]
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    moments = (x for of_one in optimizer.state.values() for x in of_one.values())
    held = sum(x.nbytes for x in (*d.model.parameters(), *d.model.buffers(), *moments))
    return (held + max(event["Total Allocated"] for event in memory) - before) >> 20


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    @cache
    def compiled(function: Any) -> Any:
        return torch.compile(function)

    with ExitStack() as stack:
        for module in (ci_fns, distance, hashed, leaky_hard, masked, powers):
            stack.enter_context(patch.object(module, "fused", lambda f, _device: compiled(f)))
        stack.enter_context(patch.object(native, "library", lambda: None))
        fixed = PropertyMock(return_value=True)
        stack.enter_context(patch.object(StepRandomness, "has_fixed_shapes", fixed))
        yield


if __name__ == "__main__":
    main()
