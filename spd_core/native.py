"""Compiled loops for float32 on the CPU, in place of chains of operators that memory is slow for.

Without a C compiler everything runs on PyTorch's operators, to the same values up to rounding.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from spd_core.run_dir import written_whole

SOURCE = Path(__file__).with_name("native.c")
# Sums may be reordered, so that they vectorise; -ffast-math would change the whole process.
FLAGS = "-O3 -march=native -fassociative-math -fno-signed-zeros -fno-trapping-math -fno-math-errno"


def is_native(*tensors: Tensor) -> bool:
    """Whether these can be given to the loops, and there are any."""
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    return plain and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, or None without a C compiler. Compiled once per machine, in a second.

    Raises:
        PermissionError: another user owns the folder that they would be loaded from.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    folder = Path(tempfile.gettempdir(), f"spd-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user; set TMPDIR to a folder of yours")
    parts = (SOURCE.read_text(), FLAGS, compiler, platform.node())
    built = folder / f"native-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    if not built.exists():
        with written_whole(built) as new:
            command = [compiler, *FLAGS.split(), "-shared", "-fPIC", SOURCE, "-o", new]
            subprocess.run(command, check=True)
    return ctypes.CDLL(str(built))


def scalar_mlps(
    x: Float[Tensor, "batch C"],
    w1: Float[Tensor, "C hidden 1"],
    b1: Float[Tensor, "C hidden 1"],
    w2: Float[Tensor, "C 1 hidden"],
    b2: Float[Tensor, "C 1 1"],
) -> Float[Tensor, "batch C"]:
    """sum_k w2_k GELU(w1_k x + b1_k) + b2 for each of C scalar MLPs."""
    return cast(Tensor, _ScalarMLPs.apply(x, w1, b1, w2, b2))


class _ScalarMLPs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        _run("mlps_forward", len(w1), *x.shape, w1.shape[1], x, w1, b1, w2, b2, out)
        ctx.save_for_backward(x, w1, b1, w2, b2)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        x, w1, b1, w2, b2 = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        found = [torch.empty_like(t) for t in (x, w1, b1, w2, b2)]
        _run("mlps_backward", len(w1), *x.shape, w1.shape[1], x, w1, b1, w2, grad, *found)
        return tuple(found)


def leaky_hard(
    x: Float[Tensor, "..."], leak: float
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """The pair lower_leaky_hard, upper_leaky_hard of `ci_fns`."""
    return cast(tuple[Tensor, Tensor], _LeakyHard.apply(x, leak))


class _LeakyHard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, leak: float) -> tuple[Tensor, Tensor]:
        x, ctx.leak = x.contiguous(), leak
        lower, upper = torch.empty_like(x), torch.empty_like(x)
        _run("leaky_hard_forward", x.numel(), leak, x, lower, upper)
        ctx.save_for_backward(x)
        return lower, upper

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (x,), grads = ctx.saved_tensors, [grad.contiguous() for grad in grad_outputs]
        found = torch.empty_like(x)
        _run("leaky_hard_backward", x.numel(), ctx.leak, x, *grads, found)
        return found, None


def _run(loop: str, n_items: int, *arguments: Tensor | int | float) -> None:
    """Call a loop for all items, in as many equal parts as torch has threads."""
    compiled = library()
    assert compiled is not None
    given: list[Any] = []
    for value in arguments:
        match value:
            case Tensor():
                assert value.is_contiguous() and value.dtype == torch.float32
                given.append(ctypes.c_void_p(value.data_ptr()))
            case float():
                given.append(ctypes.c_float(value))
            case int():
                given.append(ctypes.c_int64(value))
    n_threads, int64 = torch.get_num_threads(), ctypes.c_int64
    ends = [i * n_items // n_threads for i in range(n_threads + 1)]
    parts = [(int64(a), int64(b), *given) for a, b in pairwise(ends)]
    list(_pool(n_threads).map(lambda part: getattr(compiled, loop)(*part), parts))


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads)
