"""Compiled loops for float32 on the CPU, in place of chains of operators that wait for memory.

Without a C compiler everything runs on PyTorch's operators, to the same values up to rounding.
"""

import ctypes
import os
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).with_name("native.c")
# Sums may be reordered, so that they vectorise; -ffast-math would change the whole process.
MATH = "-fassociative-math -fno-signed-zeros -fno-trapping-math -fno-math-errno"
HALF = {torch.float32: False, torch.bfloat16: True}
FLAGS = f"-shared -fPIC -fopenmp -O3 -march=native {MATH}"


@cache
def library() -> ctypes.CDLL | None:
    """The loops, compiled once per process in a quarter of a second; None without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        Path(built := f"{folder}/native.so").write_bytes(bytes(2**20))  # else the disk is full
        try:
            command = [os.environ.get("CC", "cc"), *FLAGS.split(), SOURCE, "-o", built]
            subprocess.run(command, check=True)
            return ctypes.CDLL(built)
        except (subprocess.CalledProcessError, OSError) as error:
            warnings.warn(f"no compiled loops, so steps take longer: {error}", stacklevel=2)
            return None


def has_loops(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are loops for such tensors."""
    return dtype == torch.float32 and device.type == "cpu" and library() is not None


def is_native(x: Tensor) -> bool:
    """Whether loops take it: bfloat16 as well, from which they compute in float32."""
    return x.dtype in HALF and has_loops(x.device, torch.float32)


def hashed(key: int, shift: int, rows: Int[Tensor, "n"], width: int) -> Float[Tensor, "n {width}"]:
    """Numbers of `fast.hashed` at the places row x width + column."""
    numbers = torch.empty(len(rows), width, dtype=torch.float32)
    run("hashed", (len(rows), width, key, shift), rows, numbers)
    return numbers


def scalar_mlps(
    x: Float[Tensor, "batch C"],
    w1: Float[Tensor, "C hidden 1"],
    b1: Float[Tensor, "C hidden 1"],
    w2: Float[Tensor, "C 1 hidden"],
    b2: Float[Tensor, "C 1 1"],
) -> Float[Tensor, "batch C"]:
    """sum_k w2_k GELU(w1_k x + b1_k) + b2 for each of C scalar MLPs, in float32."""
    (out,) = _Loops.apply("mlps", (*x.shape, w1.shape[1]), [x.shape], x.float(), w1, b1, w2, b2)
    return out


def lower_leaky_hard(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """That of `fast.leaky_hard`, in float32."""
    sizes = x.numel(), HALF[x.dtype]
    return _Loops.apply("lower_leaky_hard", sizes, [x.shape], x)[0]


def power_sums(
    x: Float[Tensor, "n C"], p: float, eps: float, n_times: Float[Tensor, "n"]
) -> Float[Tensor, "C"]:
    """Sums over n of n_times (upper_leaky_hard(x) + eps)^p, in float32."""
    inputs, sizes = (x, n_times, torch.tensor([p, eps])), (*x.shape, HALF[x.dtype])
    return _Loops.apply("power_sums", sizes, [x.shape[1:]], *inputs)[0]


class _Loops(torch.autograd.Function):
    """LOOP_forward makes outputs of these shapes, LOOP_backward the inputs' gradients.

    The first input may be bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any, loop: str, sizes: tuple[int, ...], shapes: list[torch.Size], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        assert inputs[0].dtype in HALF and all(x.dtype == torch.float32 for x in inputs[1:])
        inputs, ctx.of = tuple(x.contiguous() for x in inputs), (loop, sizes)
        outputs = tuple(torch.empty(shape, dtype=torch.float32) for shape in shapes)
        run(f"{loop}_forward", sizes, *inputs, *outputs)
        ctx.save_for_backward(*inputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        inputs, (loop, sizes) = ctx.saved_tensors, ctx.of
        first, *others = inputs
        gradients = [torch.empty_like(first), *map(torch.zeros_like, others)]
        given = [grad.contiguous() for grad in grad_outputs]
        run(f"{loop}_backward", sizes, *inputs, *given, *gradients)
        return (None, None, None, *gradients)


def run(loop: str, sizes: tuple[int, ...], *arrays: Tensor) -> None:
    assert all(array.is_contiguous() for array in arrays)
    pointers = [ctypes.c_void_p(array.data_ptr()) for array in arrays]
    getattr(library(), loop)(torch.get_num_threads(), *map(ctypes.c_int64, sizes), *pointers)
