"""What is kept and made again; that training learns the same is in test_step.py."""

import pytest
import torch
from torch import nn

from spd_core.fast.checkpointed import caller


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.n_calls = nn.Parameter(torch.randn(5)), 0

    def forward(self, x, other):
        assert other is None
        self.n_calls += 1
        return (x * self.weight).tanh().square()


@pytest.mark.parametrize("kind, n_calls", [("off", 1), ("ci_fns", 2)])
def test_a_call_is_made_again_for_gradients(kind, n_calls):
    function, x = Counted(), torch.randn(3, 5, requires_grad=True)
    out = caller(kind)(function, x, None)
    found = torch.autograd.grad(out.sum(), (x, function.weight))
    assert function.n_calls == n_calls
    wanted = torch.autograd.grad(function(x, None).sum(), (x, function.weight))
    assert all(map(torch.equal, found, wanted))


def test_without_gradients_nothing_is_made_again():
    function = Counted()
    with torch.no_grad():
        assert not caller("ci_fns")(function, torch.randn(3, 5), None).requires_grad
    assert function.n_calls == 1
