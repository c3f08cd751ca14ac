"""Every chain that GPUs compile: it can be traced whole, and means the same then."""

import pytest
import torch

from spd_core import ci_fns
from spd_core.fast import hashed, leaky_hard, masked, mlps, powers
from spd_core.fast.fused import fused
from spd_core.losses import distance
from spd_core.randomness import Stream

CPU = torch.device("cpu")
STREAM = Stream((0, "test"), torch.tensor(3), 0, 6, None)
PARTS = [(5, 4), (5, 4), (5, 4), (5,)]
CHAINS = {
    "hashed": (hashed.hashed, lambda: (torch.tensor(5), torch.tensor(2), 3, 40, torch.float32)),
    "masked": (masked._masked, lambda: (torch.randn(6, 5), torch.rand(6, 5), torch.rand(6, 1))),
    "by_draw": (masked._by_source, lambda: (torch.randn(6, 5), torch.rand(6, 5), True,
                                            STREAM.next())),
    "by_draw_back": (masked._gradients_by_source, lambda: (
        torch.randn(6, 5), torch.randn(6, 5), torch.rand(6, 5), True, STREAM.next(),
        (True, True, True, False))),
    "shared_source": (masked._gradients_by_source, lambda: (
        torch.randn(6, 5), torch.randn(6, 5), torch.rand(6, 5), True, torch.rand(1, 6),
        (False, False, False, True))),
    "clamped": (leaky_hard._clamped, lambda: (torch.randn(6, 5),)),
    "leaked": (leaky_hard._leaked, lambda: (torch.randn(6, 5), torch.randn(6, 5))),
    "swish_hard": (ci_fns._shared_value, lambda: ("swish_hard", torch.randn(6, 5))),
    "jittered": (ci_fns._jittered, lambda: (torch.randn(6, 5), torch.rand(6, 5))),
    "powers": (powers._power_sums, lambda: (torch.rand(6, 5), torch.tensor(0.7), 1e-12,
                                            torch.ones(6))),
    "mse": (distance._squared_error, lambda: (torch.randn(6, 5), torch.randn(6, 5))),
    "kl": (distance._kl, lambda: (torch.randn(6, 5), torch.randn(6, 5))),
    "mlps": (mlps._mlps, lambda: (torch.randn(6, 5), *map(torch.randn, PARTS))),
    "mlps_grad_x": (mlps._mlps_grad_x, lambda: (torch.randn(6, 5), torch.randn(6, 5),
                                                *map(torch.randn, PARTS))),
    "mlps_grad_parameters": (mlps._mlps_grad_parameters, lambda: (
        torch.randn(6, 5), torch.randn(6, 5), *map(torch.randn, PARTS))),
}  # fmt: skip


def run(function, inputs):
    """Outputs, and gradients of their sum for all inputs that have one."""
    leaves = [
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    out = function(*leaves)
    outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    total = sum(o.sum() for o in outputs)
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else ()
    return [*outputs, *(g for g in gradients if g is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_is_traced_whole_and_means_the_same(chain):
    function, make = CHAINS[chain]
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        inputs = make()
        got, wanted = run(compiled, inputs), run(function, inputs)
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_on_a_cpu_a_chain_stays_as_it_is():
    assert fused(distance._kl, CPU) is distance._kl
