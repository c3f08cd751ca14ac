import numpy as np
import pytest
import torch

from spd_core.randomness import stream
from spd_core.targets.resid_mlp import ResidMLP, resid_mlp_problem, train_resid_mlp
from spd_launch.compose import compose
from spd_launch.validate import validate

SMALL = ("target.n_features=6", "target.d_embed=40", "target.d_mlp=24", "target.batch_size=256",
         "data.feature_probability=0.2", "eval.metrics.identity_ci_error=null")  # fmt: skip


@pytest.fixture
def config():
    def make(*overrides):
        arguments = ["+experiment=resid_mlp1", "cluster=local", *SMALL, *overrides]
        return validate(compose(arguments, multirun=False)[0].values)

    return make


def make(config, seed=0):
    return ResidMLP(config.target, stream(seed, "test", device=torch.device("cpu")))


def test_forward(config):
    model = make(config("target.n_layers=2"))
    x = torch.rand(7, 6) * 2 - 1
    W_E = model.W_E.numpy()
    residual = x.numpy() @ W_E
    for layer in model.layers:
        W_in, W_out = (m.weight.detach().numpy() for m in (layer.mlp_in, layer.mlp_out))
        residual = residual + np.maximum(residual @ W_in.T, 0) @ W_out.T
    np.testing.assert_allclose(model(x).detach(), residual @ W_E.T, atol=1e-5)


def test_the_embedding_is_fixed_with_rows_of_length_one(config):
    model = make(config())
    torch.testing.assert_close(model.W_E.norm(dim=1), torch.ones(6))
    assert {n for n, _ in model.named_parameters()} == {
        "layers.0.mlp_in.weight", "layers.0.mlp_out.weight"}  # fmt: skip


def test_training_computes_relu_on_top_of_the_input(config):
    small = config("target.steps=400")
    model, loss = train_resid_mlp(small.target, small.data, 0)
    x = torch.diag(torch.tensor([0.9, -0.9, 0.5, -0.5, 1.0, -1.0]))
    wanted = (x + x.relu()).diagonal()
    torch.testing.assert_close(model(x).diagonal().detach(), wanted, atol=0.3, rtol=0)
    assert loss < 0.01 and resid_mlp_problem(model) is None


def test_an_untrained_model_is_a_bad_target(config):
    model = make(config())
    for layer in model.layers:
        layer.mlp_out.weight.data.zero_()
    assert "no ReLU of features [0, 1, 2, 3, 4, 5]" in resid_mlp_problem(model)


def test_a_layer_that_leaves_a_feature_to_the_other_makes_a_bad_target(config):
    """Both layers double what is positive of each feature; then the second forgets feature 3."""
    model = make(config("target.n_layers=2", "target.d_embed=6", "target.d_mlp=6"))
    model.W_E.copy_(torch.eye(6))
    for layer in model.layers:
        layer.mlp_in.weight.data.copy_(torch.eye(6))
        layer.mlp_out.weight.data.copy_(torch.eye(6))
    assert resid_mlp_problem(model) is None
    model.layers[1].mlp_in.weight.data[3, 3] = 0.21
    assert resid_mlp_problem(model) is None
    model.layers[1].mlp_in.weight.data[3, 3] = 0.19
    assert resid_mlp_problem(model) == "leaves features [3] to other layers than 1"
