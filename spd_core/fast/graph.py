"""The optimisation step as a CUDA graph: recorded once, then replayed with other numbers.

A small model's step is hundreds or thousands of kernels of a few microseconds, which a GPU runs
faster than a host can ask for them one by one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from spd_core.data.batches import Batch, Decomposition, draw_examples
from spd_core.metrics import Sums
from spd_core.randomness import StepRandomness
from spd_core.step import Scheduled, StepResult, descend, optimisation_step, scheduled, set_lr
from spd_core.targets.config import TextDataConfig

ObserveLogged = Callable[[Batch, bool], Sums]
N_EAGER = 3  # steps in which libraries and compiled kernels get ready


class StepGraph:
    """Takes the place of `optimisation_step`; `observe` may do other things when a step is logged.

    Results are overwritten by the next step. What a graph is told per step lies at fixed places:
    the step's number, coefficients and p, the learning rate, and examples that come from the host.
    """

    def __init__(
        self, d: Decomposition, optimizer: torch.optim.AdamW, observe: ObserveLogged
    ) -> None:
        self.d, self.optimizer, self.observe = d, optimizer, observe
        device, now = d.dist.device, scheduled(d.config, 0)
        self.values = [*now.coeffs.values(), *now.p.values()]
        self.numbers = torch.tensor(self.values, device=device)
        each = iter(self.numbers)
        coeffs, p = ({name: next(each) for name in of} for of in (now.coeffs, now.p))
        self.now, self.counter = Scheduled(coeffs, p), torch.zeros((), dtype=torch.long).to(device)
        self.examples = self._from_host(0)
        self.recorded: dict[bool, tuple[torch.cuda.CUDAGraph, StepResult]] = {}
        self.stream, self.n_taken = torch.cuda.Stream(device), 0

    def __call__(self, step: int, draw: int, logged: bool) -> StepResult:
        """Step number `step`, drawn by the number `draw`.

        Raises:
            ValueError: the step does something that cannot be recorded.
        """
        set_lr(self.d.config, self.optimizer, step)
        self.counter.fill_(draw)
        now = scheduled(self.d.config, step)
        if (values := [*now.coeffs.values(), *now.p.values()]) != self.values:
            self.numbers.copy_(torch.tensor(values).pin_memory(), non_blocking=True)
            self.values = values
        if self.examples is not None and (examples := self._from_host(draw)) is not None:
            self.examples.copy_(examples)
        self.n_taken += 1
        if self.n_taken <= N_EAGER:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self._descend(logged)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if logged not in self.recorded:
            self.recorded[logged] = self._record(logged)
        graph, result = self.recorded[logged]
        graph.replay()
        return result

    def _from_host(self, draw: int) -> Tensor | None:
        config, dist = self.d.config, self.d.dist
        if not isinstance(config.data, TextDataConfig):
            return None
        batch_size = config.train.batch_size
        randomness = StepRandomness(config.seed, draw, 0, 1, batch_size, dist.device)
        return draw_examples(config, self.d.data, randomness, "train")

    def _descend(self, logged: bool) -> StepResult:
        def observe(batch: Batch) -> Sums:
            return self.observe(batch, logged)

        given = self.counter, self.examples
        return descend(self.d, self.optimizer, 0, self.now, observe, given)

    def _record(self, logged: bool) -> tuple[torch.cuda.CUDAGraph, StepResult]:
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other, _ in self.recorded.values()), None)
        try:
            # Another thread, which writes a checkpoint, may go on.
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                result = self._descend(logged)
        except RuntimeError as error:
            cause = error.__context__ or error  # on top of it comes that the recording has ended
            if "captur" not in str(cause):
                raise
            raise ValueError(
                f"this step cannot be recorded as a CUDA graph: {cause}; train.compile=default "
                "takes it without one"
            ) from error
        return graph, result


def step_taker(
    d: Decomposition, optimizer: torch.optim.AdamW, observe: ObserveLogged
) -> Callable[[int, int, bool], StepResult]:
    """`optimisation_step` of (step, draw, logged), recorded where a lone rank has a GPU."""
    alone_on_gpu = d.dist.world_size == 1 and d.dist.device.type == "cuda"
    if d.config.train.compile == "max" and alone_on_gpu:
        return StepGraph(d, optimizer, observe)

    def take_step(step: int, draw: int, logged: bool) -> StepResult:
        return optimisation_step(d, optimizer, step, draw, lambda batch: observe(batch, logged))

    return take_step
