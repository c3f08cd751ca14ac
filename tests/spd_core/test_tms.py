import numpy as np
import pytest
import torch

from spd_core.randomness import stream
from spd_core.targets.tms import TMS


def make(config, seed=0):
    return TMS(config.target, stream(seed, "test", device=torch.device("cpu")))


def test_forward(make_config):
    model = make(make_config("target.init_bias_to_zero=false"))
    x = torch.rand(7, 5)
    W, b = model.linear1.weight.detach().numpy(), model.linear2.bias.detach().numpy()
    assert W.shape == (2, 5) and np.abs(b).min() > 0
    wanted = np.maximum(x.numpy() @ W.T @ W + b, 0)
    np.testing.assert_allclose(model(x).detach(), wanted, atol=1e-6)


def test_weights_are_tied_and_the_bias_can_start_at_zero(make_config):
    model = make(make_config())
    assert torch.equal(model.linear2.weight, model.linear1.weight.T)
    assert (model.linear2.bias == 0).all() and model.linear1.bias is None
    model.linear1.weight.data[0, 0] = 5.0
    model.copy_tied_weight()
    assert model.linear2.weight[0, 0] == 5.0


@pytest.mark.parametrize("other", [0, 1])
def test_initial_weights_depend_on_the_stream_alone(other, make_config):
    torch.manual_seed(other)
    first = make(make_config()).linear1.weight
    assert torch.equal(first, make(make_config(), 0).linear1.weight)
    assert not torch.equal(first, make(make_config(), 1).linear1.weight)
    assert first.abs().max() <= 5**-0.5


def test_identities_between_the_layers_change_nothing_and_never_train(make_config):
    from spd_core.targets.tms import train_tms

    config = make_config("target.n_hidden_layers=2", "target.steps=20")
    model, _ = train_tms(config.target, config.data, 0)
    plain, _ = train_tms(make_config("target.steps=20").target, config.data, 0)
    for layer in model.hidden_layers:
        assert torch.equal(layer.weight, torch.eye(2))
    x = torch.rand(7, 5)
    torch.testing.assert_close(model(x), plain(x))
