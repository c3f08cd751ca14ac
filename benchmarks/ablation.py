"""What each part of a step's speed is worth on a CPU: the step without it, against the whole step.

    python -m benchmarks.ablation [--only CASE ...] [--steps N] [--threads N]

All compute the same losses (tests/benchmarks/test_benchmark_ablation.py) and take turns of one step
in one process per case. Writes benchmarks/results/ablation-N-threads.json.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from torch import Tensor

from benchmarks.step import composed, with_random_target
from benchmarks.table import CASES, RESULTS
from spd_core import masks, rows, step
from spd_core.component_model import ComponentModel
from spd_core.components import LinearComponents
from spd_core.data import batches
from spd_core.data.batches import Batch, Decomposition, make_batch
from spd_core.distributed import Dist
from spd_core.fast import hashed, native
from spd_core.fast.masked import LazyMask, masked_product
from spd_core.losses import loss_parts, pgd
from spd_core.rows import Rows, at_rows
from spd_core.step import optimisation_step
from spd_core.train import build_optimizer
from spd_launch.task import TUNING

Ablation = Callable[[Decomposition], AbstractContextManager[Any]]
HALF = ["train.autocast=bf16"]
CASES_AND_PRECISION = {
    "tms_5-2": ("tms_5-2", []),
    "tms_40-10": ("tms_40-10", []),
    "resid_mlp2": ("resid_mlp2", []),
    "resid_mlp2, bf16": ("resid_mlp2", HALF),
    "ss_llama_simple": ("ss_llama_simple", []),
    "ss_llama_simple, bf16": ("ss_llama_simple", HALF),
}
N_WARMUP = 3


@contextmanager
def dense_delta(_: Decomposition) -> Iterator[None]:
    """x (W - (V U)^T)^T of a matrix that is built, in place of the module's own output."""
    seen, hooks = dict[LinearComponents, Tensor](), ComponentModel._hooks

    def remembering(self: ComponentModel, names: Any, hook: Callable[..., Any]) -> Any:
        def remember(name: str, x: Tensor, out: Tensor) -> Any:
            seen[self.components[name]] = x
            return hook(name, x, out)

        return hooks(self, names, remember)

    def dense(
        self: LinearComponents, inner_acts: Tensor, target_out: Tensor, mask: Any, delta_mask: Any
    ) -> Tensor:
        out, m_d = masked_product(inner_acts, self.U, mask, delta_mask)
        x = seen[self]
        if isinstance(mask, LazyMask):
            x = at_rows(x, mask.rows, x.dim() - 1)
        if m_d is not None:
            out = out + (inner_acts * m_d) @ self.U
            out = out + m_d * (x.to(self.V.dtype) @ (self.weight - (self.V @ self.U).T).T)
        bias = getattr(self._module[0], "bias", None)
        return (out if bias is None else out + bias).to(target_out.dtype)

    hooked = patch.object(ComponentModel, "_hooks", remembering)
    with hooked, patch.object(LinearComponents, "forward", dense):
        yield


def anew_for_each_loss(d: Decomposition) -> AbstractContextManager[Any]:
    """The target's forward pass, x V and causal importances once for each loss."""

    def parts(name: str, config: Any, batch: Batch, whole: Any) -> Any:
        return loss_parts(name, config, make_batch(d, batch.randomness, "train"), whole)

    return patch.object(step, "loss_parts", parts)


def own_acts_anew(_: Decomposition) -> AbstractContextManager[Any]:
    """x V of the target's own inputs in every masked pass."""
    run = ComponentModel.run_masked

    def without(self: ComponentModel, *arguments: Any, own_acts: Any = None) -> Tensor:
        del own_acts
        return run(self, *arguments)

    return patch.object(ComponentModel, "run_masked", without)


def every_row(_: Decomposition) -> AbstractContextManager[Any]:
    """Routed modules at all positions, of which those that are wanted are chosen."""
    return patch.object(Rows, "of", staticmethod(lambda chosen: chosen))


@contextmanager
def any_number_of_rows(_: Decomposition) -> Iterator[None]:
    """Numbers of rows as they come, not multiples of 32."""
    with patch.object(rows, "ROUND", 1), patch.object(batches, "ROUND", 1):
        yield


def silent_examples(_: Decomposition) -> AbstractContextManager[Any]:
    return patch.object(batches, "_silent_examples", lambda *_: torch.arange(0))


@contextmanager
def masks_by_operators(_: Decomposition) -> Iterator[None]:
    """Masks and their numbers written down, and applied by operators."""
    with patch.object(masks, "native", SimpleNamespace(is_native=lambda _: False)):
        yield


@contextmanager
def numbers_by_operators(d: Decomposition) -> Iterator[None]:
    """Random numbers and masks by operators."""
    nothing = SimpleNamespace(has_loops=lambda *_: False)
    with masks_by_operators(d), patch.object(hashed, "native", nothing):
        yield


def no_loops(_: Decomposition) -> AbstractContextManager[Any]:
    """Everything by PyTorch's operators."""
    return patch.object(native, "library", lambda: None)


@contextmanager
def gradients_of_all(d: Decomposition) -> Iterator[None]:
    """In the search for adversarial sources, gradients for all weights as well."""
    backward, trained = Tensor.backward, d.model.trained_parameters().values()

    def of_all(self: Tensor, inputs: Any = None) -> None:
        backward(self, retain_graph=inputs is not None)  # x V is of use once more
        if inputs is not None:
            for p in trained:
                p.grad = None

    learning = patch.object(pgd, "frozen", lambda _: nullcontext())
    with learning, patch.object(Tensor, "backward", of_all):
        yield


WITHOUT: dict[str, Ablation] = {
    "the delta from the module's own output": dense_delta,
    "target and importances once per step": anew_for_each_loss,
    "x V of the target's own inputs once": own_acts_anew,
    "routed rows alone": every_row,
    "rows in multiples of 32": any_number_of_rows,
    "silent examples left out": silent_examples,
    "masks in a loop": masks_by_operators,
    "numbers and masks in loops": numbers_by_operators,
    "all loops": no_loops,
    "PGD's gradient for sources alone": gradients_of_all,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES_AND_PRECISION, default=[])
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    given = parser.parse_args()
    file = RESULTS / f"ablation-{given.threads}-threads.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    os.environ.update(TUNING)  # read as a process starts, hence one for each case
    for case in given.only or CASES_AND_PRECISION:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            results[case] = process.submit(measure, case, given.steps, given.threads).result()
        file.write_text(json.dumps(results, indent=1) + "\n")
    Console(width=150).print(table(results))
    print(f"written to {file}")


def measure(case: str, n_steps: int, n_threads: int) -> dict[str, float]:
    """Seconds of the whole step, and how many times as long it takes without each part."""
    torch.set_num_threads(n_threads)
    experiment, precision = CASES_AND_PRECISION[case]
    config, data = composed(experiment, [*CASES[experiment], *precision])
    d = with_random_target(config, data, Dist(0, 1, torch.device("cpu")))
    optimizer = build_optimizer(config, d.model)
    ways: dict[str, Ablation] = {"whole": lambda _: nullcontext(), **WITHOUT}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for at in track(range(N_WARMUP + n_steps), case):
        for way, without in ways.items():
            with without(d):
                started = time.perf_counter()
                optimisation_step(d, optimizer, at, at, lambda _batch: {})
                seconds[way].append(time.perf_counter() - started)
    medians = {way: statistics.median(taken[N_WARMUP:]) for way, taken in seconds.items()}
    whole = medians.pop("whole")
    return {"s": round(whole, 5)} | {way: round(s / whole, 2) for way, s in medians.items()}


def table(results: dict[str, dict[str, float]]) -> Table:
    """A row for each part, a column for each case."""
    columns = (Column(header, no_wrap=True) for header in ["times as long without", *results])
    shown = Table(
        *columns, title="the step without one part, against the whole", title_justify="left"
    )
    for part in WITHOUT:
        shown.add_row(part, *(f"{found[part]:.2f}" for found in results.values()))
    shown.add_row("the whole, s", *(f"{found['s']:.4f}" for found in results.values()))
    return shown


if __name__ == "__main__":
    main()
