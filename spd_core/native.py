"""Compiled loops for float32 on the CPU, in place of chains of operators that wait for memory.

Without a C compiler everything runs on PyTorch's operators, to the same values up to rounding.
"""

import ctypes
import os
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

SOURCE = Path(__file__).with_name("native.c")
# Sums may be reordered, so that they vectorise; -ffast-math would change the whole process.
MATH = "-fassociative-math -fno-signed-zeros -fno-trapping-math -fno-math-errno"
FLAGS = f"-shared -fPIC -O3 -march=native {MATH}"
thread_pool = cache(ThreadPoolExecutor)


@cache
def library() -> ctypes.CDLL | None:
    """The loops, compiled once per process in a quarter of a second; None where that fails."""
    with tempfile.TemporaryDirectory() as folder:
        built = f"{folder}/native.so"
        try:
            command = [os.environ.get("CC", "cc"), *FLAGS.split(), SOURCE, "-o", built]
            subprocess.run(command, check=True)
            return ctypes.CDLL(built)
        except (subprocess.CalledProcessError, OSError) as error:
            warnings.warn(f"no compiled loops, so steps take longer: {error}", stacklevel=2)
            return None


def is_native(x: Tensor) -> bool:
    """Whether the loops can take it, and are there."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and library() is not None


def scalar_mlps(
    x: Float[Tensor, "batch C"],
    w1: Float[Tensor, "C hidden 1"],
    b1: Float[Tensor, "C hidden 1"],
    w2: Float[Tensor, "C 1 hidden"],
    b2: Float[Tensor, "C 1 1"],
) -> Float[Tensor, "batch C"]:
    """sum_k w2_k GELU(w1_k x + b1_k) + b2 for each of C scalar MLPs."""
    (out,) = _Loops.apply("mlps", len(w1), (*x.shape, w1.shape[1]), 1, x, w1, b1, w2, b2)
    return out


def leaky_hard(x: Float[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """The pair lower_leaky_hard, upper_leaky_hard of `ci_fns`."""
    return cast(tuple[Tensor, Tensor], _Loops.apply("leaky_hard", x.numel(), (), 2, x))


class _Loops(torch.autograd.Function):
    """LOOP_forward makes n outputs like the first input, LOOP_backward the inputs' gradients."""

    @staticmethod
    def forward(
        ctx: Any, loop: str, n_items: int, sizes: tuple[int, ...], n: int, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        inputs, ctx.of = tuple(x.contiguous() for x in inputs), (loop, n_items, sizes)
        outputs = tuple(torch.empty_like(inputs[0]) for _ in range(n))
        _run(f"{loop}_forward", n_items, sizes, *inputs, *outputs)
        ctx.save_for_backward(*inputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs, (loop, n_items, sizes) = ctx.saved_tensors, ctx.of
        gradients = [torch.empty_like(x) for x in inputs]
        given = [grad.contiguous() for grad in grad_outputs]
        _run(f"{loop}_backward", n_items, sizes, *inputs, *given, *gradients)
        return (None, None, None, None, *gradients)


def _run(loop: str, n_items: int, sizes: tuple[int, ...], *arrays: Tensor) -> None:
    """Do all items, in as many equal parts as torch has threads."""
    assert all(a.is_contiguous() and a.dtype == torch.float32 for a in arrays)
    compiled, n_threads = getattr(library(), loop), torch.get_num_threads()
    ends = [i * n_items // n_threads for i in range(n_threads + 1)]
    rest = [*map(ctypes.c_int64, sizes), *(ctypes.c_void_p(a.data_ptr()) for a in arrays)]
    parts = [(ctypes.c_int64(a), ctypes.c_int64(b), *rest) for a, b in pairwise(ends)]
    list(thread_pool(n_threads).map(lambda part: compiled(*part), parts))
