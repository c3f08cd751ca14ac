"""What is kept and made again; that training learns the same is in test_step.py."""

import pytest
import torch
from torch import nn

from spd_core.fast.checkpointed import caller


class Noisy(nn.Module):
    """Draws numbers, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.n_calls = nn.Parameter(torch.randn(5)), 0

    def forward(self, x, other):
        assert other is None
        self.n_calls += 1
        return (x * self.weight * torch.rand(5)).tanh().square()


@pytest.mark.parametrize("kind, n_calls", [("off", 1), ("ci_fns", 2)])
def test_a_call_is_made_again_with_the_numbers_that_it_drew(kind, n_calls):
    function, x = Noisy(), torch.randn(3, 5, requires_grad=True)
    torch.manual_seed(3)
    out = caller(kind, draws=True)(function, x, None)
    torch.rand(7)
    found = torch.autograd.grad(out.sum(), (x, function.weight))
    assert function.n_calls == n_calls
    torch.manual_seed(3)
    wanted = torch.autograd.grad(function(x, None).sum(), (x, function.weight))
    assert all(map(torch.equal, found, wanted))


def test_without_gradients_nothing_is_made_again():
    function = Noisy()
    with torch.no_grad():
        assert not caller("ci_fns", draws=True)(function, torch.randn(3, 5), None).requires_grad
    assert function.n_calls == 1
