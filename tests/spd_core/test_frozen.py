import pytest
import torch
from torch import nn

from spd_core.fast.frozen import frozen


def test_what_was_frozen_learns_again_also_after_an_error_and_what_was_not_does_not():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    parameters[1].requires_grad_(False)
    with pytest.raises(KeyError), frozen(parameters):
        assert not (parameters[0] * parameters[2]).requires_grad
        raise KeyError
    assert [p.requires_grad for p in parameters] == [True, False, True]
