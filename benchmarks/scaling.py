"""Data-parallel steps on this machine: throughput, collectives and products, counted and on paper.

    python -m benchmarks.scaling [--dp 1 2 4] [--steps N] [--threads N] [--only EXPERIMENT ...]
    python -m benchmarks.scaling --paper        what the formulas say of H100s; runs nothing

The whole batch stays the same, so each of dp ranks has 1/dp of it. Counted are the calls of
torch.distributed in one step (training adds one of 4 bytes, whether a rank wants to stop), and the
products of matrices, by PyTorch's FlopCounterMode. The formulas stand in docs/performance.md.
Writes benchmarks/results/scaling-N-threads.json.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from rich.console import Console
from rich.table import Column, Table
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step import composed, with_random_target
from benchmarks.table import CASES, RESULTS
from spd_core import distributed
from spd_core.config import CiFnConfig, RunConfig
from spd_core.config.losses import PGDReconConfig
from spd_core.data.batches import Decomposition
from spd_core.fast.overlap import BUCKET
from spd_core.rows import ROUND
from spd_core.step import optimisation_step
from spd_core.targets.config import ResidMLPTargetConfig, TransformerTargetConfig
from spd_core.train import build_optimizer
from spd_launch.ports import free_port
from spd_launch.task import TUNING

EXPERIMENTS = ("resid_mlp2", "ss_llama_simple")
N_WARMUP = 3
# One H100 SXM, by its data sheet: dense bf16 FLOP/s and bytes/s of its memory; bytes/s that it
# sends over NVLink, and over InfiniBand (400 Gb/s for each GPU). Of the first two the shares that a
# step may reach: guesses, as nothing of this was run on a GPU. Seconds of one hop of a collective.
FLOP_RATE, FLOP_SHARE = 989e12, 0.4
MEMORY_RATE, MEMORY_SHARE = 3.35e12, 0.7
NVLINK, INFINIBAND, GPUS_PER_NODE, HOP_S = 450e9, 50e9, 8, 5e-6
OVERLAP = 0.6  # share of a step within which gradients come, for ss_llama_simple on a CPU
N_WIDE = 30  # times that a pass and its gradient read or write an array of tokens x subcomponents


@dataclass(frozen=True)
class Sizes:
    """What the formulas need of an experiment whose importances are of kind shared_mlp."""

    modules: tuple[tuple[int, int, int], ...]  # d_in, d_out, C; first those of the target's input
    n_first: int  # how many see just what they see in the target's own pass
    hidden: int
    target_flops: int  # of the target's forward pass, per token
    target_flops_back: int  # of a gradient through it, to the outputs of the first modules
    n_losses: int
    n_passes: int  # masked passes that weights learn from
    n_searches: int  # those that only adversarial sources learn from
    n_faithfulness: int  # 1 where that is a loss, else 0
    n_anew: int  # 1 where hidden activations of importances are made again for gradients, else 0

    @property
    def C(self) -> int:
        return sum(C for _, _, C in self.modules)

    @property
    def n_in_components(self) -> int:
        return sum(C * (d_in + d_out) for d_in, d_out, C in self.modules)

    @property
    def n_trained(self) -> int:
        h = self.hidden
        return self.n_in_components + sum(h * (d + 1) + C * (h + 1) for d, _, C in self.modules)


def sizes_of(d: Decomposition) -> Sizes:
    """Of an experiment on residual MLPs or a Llama, whose reconstruction losses take one pass each,
    in which a position's modules are a uniform k-subset.
    """
    config, target = d.config, d.config.target
    shapes = [(*c.weight.shape, c.C) for c in d.model.components.values()]
    modules = tuple((d_in, d_out, C) for d_out, d_in, C in shapes)
    match target:
        case ResidMLPTargetConfig():
            n_first, before = 1, 2 * target.n_features * target.d_embed
            after = before
        case TransformerTargetConfig():
            assert config.data.kind == "text"
            n_first, before = 3, 0  # queries, keys, values; tokens are looked up
            after = 2 * target.d_model * config.data.vocab_size
            after += target.n_layers * 4 * config.data.seq_len * target.d_model  # attention
        case _:
            raise ValueError(f"no formula for target.kind={target.kind}")
    own = [2 * d_in * d_out for d_in, d_out, _ in modules]
    flops, back = before + sum(own) + after, sum(own[n_first:]) + after
    ci_fn = config.decompose.ci_fn
    assert isinstance(ci_fn, CiFnConfig) and ci_fn.kind == "shared_mlp"
    [hidden], losses = ci_fn.hidden, config.losses.configured()
    searches = [loss.n_steps for loss in losses.values() if isinstance(loss, PGDReconConfig)]
    n_passes = sum("recon" in name for name in losses)
    return Sizes(
        modules, n_first, hidden, flops, back, len(losses), n_passes, sum(searches),
        sum(name == "faithfulness" for name in losses),
        int(config.train.activation_checkpointing == "ci_fns"),
    )  # fmt: skip


def bytes_of_collectives(sizes: Sizes) -> list[int]:
    """Of each all_reduce of a step with importance minimality, in the order they come in.

    Gradients of shared adversarial sources for each step of their search, sums of powers of
    importances, (sum, count) of all losses, gradients of all weights.
    """
    search = 4 * (sizes.C + len(sizes.modules))
    others = [*[search] * sizes.n_searches, 4 * (sizes.C + 1), 8 * sizes.n_losses]
    return [*others, *bytes_of_gradients(sizes)]


def bytes_of_gradients(sizes: Sizes) -> list[int]:
    """Of their collectives: of all U, then of each causal-importance function with its V."""
    h, modules = sizes.hidden, sizes.modules[::-1]
    others = ((C, h, h * C, h * d_in, C * d_in) for d_in, _, C in modules)
    n_each = [C * d_out for _, d_out, C in modules] + [n for of_one in others for n in of_one]
    result = [0]
    for n in n_each:
        if result[-1] >= BUCKET:
            result.append(0)
        result[-1] += 4 * n
    return result


def rows_of_pass(sizes: Sizes, tokens: float) -> float:
    """Positions at which a module runs on its subcomponents: k of m modules, for k from 1 to m.

    They are filled up to a multiple of ROUND.
    """
    m = len(sizes.modules)
    return tokens * (m + 1) / (2 * m) + ROUND / 2


def flops_of_step(sizes: Sizes, tokens: float) -> float:
    """Of the products of matrices on a rank with so many tokens, forward and backward.

    A product with weights that learn costs three times its forward pass, or twice where its input
    needs no gradient; one with the target's twice, and so one with V or U where only sources learn.
    x V of the first modules is taken once for all passes. V U of the faithfulness loss depends on
    no tokens, and each rank takes it.
    """
    h, target = sizes.hidden, sizes.target_flops + sizes.target_flops_back
    first = sum(C * d_in for d_in, _, C in sizes.modules[: sizes.n_first])
    in_passes = sizes.n_in_components - first
    of_hidden = 4 + 2 * sizes.n_anew
    importances = sum(of_hidden * d_in * h + 6 * h * C for d_in, _, C in sizes.modules)
    n = sizes.n_passes + sizes.n_searches
    masked = rows_of_pass(sizes, tokens) * (6 * sizes.n_passes + 4 * sizes.n_searches) * in_passes
    faithfulness = sizes.n_faithfulness * sum(6 * C * i * o for i, o, C in sizes.modules)
    return (
        tokens * (sizes.target_flops + importances + n * target + 4 * first) + masked + faithfulness
    )


def bytes_in_memory(sizes: Sizes, tokens: float, width: int) -> float:
    """Read or written: arrays of rows x C of `width` bytes a number, and what AdamW does.

    AdamW reads four float32 numbers for each weight and writes three; gradients are flattened for
    their collective. An estimate: nothing here counts it.
    """
    n_wide = N_WIDE * (sizes.n_passes + sizes.n_searches)
    return width * n_wide * rows_of_pass(sizes, tokens) * sizes.C + 4 * (7 + 2) * sizes.n_trained


def seconds_of_collectives(n_bytes: list[int], dp: int) -> float:
    """Rings: each rank sends 2 (dp - 1) / dp of the bytes, in 2 (dp - 1) hops or 2 log2(dp)."""
    if dp == 1:
        return 0.0
    rate = NVLINK if dp <= GPUS_PER_NODE else INFINIBAND
    sent = [2 * (dp - 1) / dp * n for n in n_bytes]
    return sum(n / rate for n in sent) + len(sent) * 2 * (dp - 1).bit_length() * HOP_S


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dp", type=int, nargs="+", default=[1, 2, 4], help="processes")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a rank")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--paper", action="store_true", help="print what the formulas say")
    given = parser.parse_args()
    if given.paper:
        for name in given.only:
            Console().print(paper(name))
        return
    os.environ.update(TUNING)  # read as a process starts
    results = {
        name: {str(dp): measure(name, CASES[name], dp, given.steps, given.threads)
               for dp in given.dp}
        for name in given.only
    }  # fmt: skip
    file = RESULTS / f"scaling-{given.threads}-threads.json"
    last = json.loads(file.read_text()) if file.exists() else {}
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(last | results, indent=1) + "\n")
    Console(width=110).print(table(results))
    print(f"written to {file}; what it means for GPUs: python -m benchmarks.scaling --paper")


def measure(
    experiment: str, overrides: list[str], dp: int, steps: int, n_threads: int
) -> dict[str, Any]:
    """Median seconds of a step, and what rank 0 counted in one; beside it what the formulas say."""
    config, data = composed(experiment, [*overrides, f"dp={dp}"])
    results = get_context("spawn").SimpleQueue()
    port = free_port(f"scaling-{os.getpid()}", dp)
    spawn(run_rank, (config, data, steps, n_threads, port, results), nprocs=dp)
    return results.get()


def run_rank(
    rank: int, config: RunConfig, data: Path, steps: int, n_threads: int, port: int, results: Any
) -> None:
    torch.set_num_threads(n_threads)
    dist = distributed.init(rank, config.dp, rank, f"127.0.0.1:{port}", "cpu")
    d = with_random_target(config, data, dist)
    optimizer, seconds = build_optimizer(config, d.model), []
    n_tokens, n_active = 0, 0

    def observe(batch: Any) -> dict:
        nonlocal n_tokens, n_active
        n_tokens, n_active = batch.n_positions, (batch.active or batch).n_positions
        return {}

    for step in range(N_WARMUP + steps):
        distributed.barrier(dist)
        started = time.perf_counter()
        optimisation_step(d, optimizer, step, step, observe)
        distributed.barrier(dist)
        seconds.append(time.perf_counter() - started)
    with counted_collectives() as n_bytes, FlopCounterMode(display=False) as flops:
        optimisation_step(d, optimizer, len(seconds), len(seconds), observe)
    median, sizes = statistics.median(seconds[N_WARMUP:]), sizes_of(d)
    if dist.is_main:
        results.put({
            "median_s": median, "tokens_or_examples_per_s": n_tokens * config.dp / median,
            "bytes": n_bytes, "flops": flops.get_total_flops(),
            "bytes_by_formula": bytes_of_collectives(sizes) if config.dp > 1 else [],
            "flops_by_formula": flops_of_step(sizes, n_active),
        })  # fmt: skip
    distributed.shutdown()


@contextmanager
def counted_collectives() -> Iterator[list[int]]:
    """The bytes of each all_reduce and broadcast of this process, in the order they come in."""
    n_bytes: list[int] = []
    originals = {name: getattr(torch_dist, name) for name in ("all_reduce", "broadcast")}

    def counting(original: Any) -> Any:
        def call(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            n_bytes.append(tensor.nbytes)
            return original(tensor, *arguments, **options)

        return call

    for name, original in originals.items():
        setattr(torch_dist, name, counting(original))
    try:
        yield n_bytes
    finally:
        for name, original in originals.items():
            setattr(torch_dist, name, original)


def table(results: dict[str, dict[str, Any]]) -> Table:
    headers = ["experiment", "dp", "s/step", "per s", "calls", "MB", "by formula", "GFLOP a rank",
               "by formula"]  # fmt: skip
    shown = Table(*(Column(header, no_wrap=True) for header in headers))
    for name, of_dp in results.items():
        for dp, found in of_dp.items():
            shown.add_row(
                name, dp, f"{found['median_s']:.3f}", f"{found['tokens_or_examples_per_s']:,.0f}",
                str(len(found["bytes"])), f"{sum(found['bytes']) / 1e6:.3f}",
                f"{sum(found['bytes_by_formula']) / 1e6:.3f}", f"{found['flops'] / 1e9:.1f}",
                f"{found['flops_by_formula'] / 1e9:.1f}",
            )  # fmt: skip
    return shown


def paper(experiment: str) -> Table:
    """Milliseconds of a step of the experiment's own batch on H100s, in bfloat16."""
    config, data = composed(experiment, CASES[experiment][:1])
    d = with_random_target(config, data, distributed.Dist(0, 1, torch.device("cpu")))
    sizes, tokens = sizes_of(d), config.train.batch_size
    if config.data.kind == "text":
        tokens *= config.data.seq_len
    title = f"{experiment}, {tokens:,} tokens or examples a step, ms on H100s (never run)"
    headers = ["GPUs", "products", "memory", "network", "not hidden", "step", "share of linear"]
    shown = Table(*headers, title=title, title_justify="left")
    n_bytes, n_bytes_hidden = bytes_of_collectives(sizes), bytes_of_gradients(sizes)[:-1]
    alone = None
    for dp in (1, 4, 8, 16, 32, 64, 128, 256):
        compute = flops_of_step(sizes, tokens / dp) / (FLOP_RATE * FLOP_SHARE)
        memory = bytes_in_memory(sizes, tokens / dp, 4) / (MEMORY_RATE * MEMORY_SHARE)
        network = seconds_of_collectives(n_bytes, dp)
        hidden = seconds_of_collectives(n_bytes_hidden, dp)
        waiting = network - min(hidden, OVERLAP * (compute + memory))
        step = compute + memory + waiting
        alone = alone or step
        times = [f"{1e3 * s:.2f}" for s in (compute, memory, network, waiting, step)]
        shown.add_row(str(dp), *times, f"{alone / dp / step:.0%}")
    return shown


if __name__ == "__main__":
    main()
