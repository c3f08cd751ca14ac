import pytest
import torch
from torch import nn

from spd_core.component_model import ComponentModel, MaskInfo, expand_patterns
from spd_core.randomness import StepRandomness


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3, bias=False))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.mlp(x))


@pytest.fixture
def model(make_config):
    decompose = make_config().decompose.model_copy(
        update={"modules": {"mlp.*": 5, "head": 3}, "tied": []}
    )
    return ComponentModel(Net(), decompose, seed=0)


def test_patterns_give_modules_in_the_targets_order():
    assert expand_patterns(Net(), {"head": 3, "mlp.[02]": 5}) == {"mlp.0": 5, "mlp.2": 5, "head": 3}


@pytest.mark.parametrize("patterns, named", [
    ({"mlp.*": 5, "tail*": 2}, "tail"),
    ({"mlp.*": 5, "*.0": 2}, "mlp.0"),
    ({"mlp.1": 5}, "mlp.1"),
])  # fmt: skip
def test_patterns_without_a_match_and_double_matches_are_errors(patterns, named):
    with pytest.raises(ValueError, match=named):
        expand_patterns(Net(), patterns)


def test_the_target_is_frozen_and_everything_else_trains(model):
    model.run_target(torch.randn(2, 4))
    assert not any(p.requires_grad for p in model.target.parameters())
    trained = model.trained_parameters()
    assert all(p.requires_grad for p in trained.values())
    assert len(trained) == len(model.component_parameters()) + len(model.ci_fn_parameters())
    assert sum("components" in name for name in trained) == 6


def test_run_target_gives_inputs_of_every_module(model):
    x = torch.randn(7, 4)
    out, inputs = model.run_target(x)
    torch.testing.assert_close(out, Net.forward(model.target, x))
    torch.testing.assert_close(inputs["mlp.0"], x)
    torch.testing.assert_close(model.target.head(inputs["head"]), out)


def test_all_ones_with_delta_is_the_target(model):
    x = torch.randn(7, 4)
    ones = {
        n: MaskInfo(torch.ones(7, c.C), torch.ones(7), None) for n, c in model.components.items()
    }
    torch.testing.assert_close(model.run_masked(x, ones), model.target(x), atol=1e-5, rtol=0)


def test_masks_for_a_subset_replace_only_those(model):
    x = torch.randn(7, 4)
    mask = torch.rand(7, 5)
    out = model.run_masked(x, {"mlp.2": MaskInfo(mask, None, None)})
    c = model.components["mlp.2"]
    hidden = torch.nn.functional.gelu(x @ model.target.mlp[0].weight.T + model.target.mlp[0].bias)
    wanted = model.target.head(((hidden @ c.V) * mask) @ c.U)
    torch.testing.assert_close(out, wanted)
    assert torch.equal(model.run_masked(x, {}), model.target(x))


def test_routes_choose_per_position(model):
    x = torch.randn(7, 4)
    route = torch.tensor([True, False, True, False, False, True, True])
    mask = MaskInfo(torch.rand(7, 3), None, None)
    everywhere = model.run_masked(x, {"head": mask})
    out = model.run_masked(x, {"head": MaskInfo(mask.mask, None, route)})
    torch.testing.assert_close(out[route], everywhere[route])
    torch.testing.assert_close(out[~route], model.target(x)[~route])


def test_hooks_are_gone_after_an_exception(model):
    x = torch.randn(7, 4)
    before = model.target(x)
    with pytest.raises(RuntimeError):
        model.run_masked(x, {"mlp.0": MaskInfo(torch.zeros(7, 4), None, None)})
    with pytest.raises(RuntimeError):
        model.run_target(torch.randn(7, 5))
    assert torch.equal(model.target(x), before)
    assert not any(m._forward_hooks for m in model.target.modules())


def test_gradients_reach_components_and_ci_fns_but_not_the_target(model):
    x = torch.randn(7, 4)
    _, inputs = model.run_target(x)
    ci = model.causal_importances(inputs, None)
    masks = {n: MaskInfo(c.lower, None, None) for n, c in ci.items()}
    (-model.run_masked(x, masks)).square().sum().backward()
    assert all(p.grad is not None for p in model.trained_parameters().values())
    assert all(p.grad is None for p in model.target.parameters())


def test_tied_modules(tms_model):
    model = tms_model()
    first, second = model.components["linear1"], model.components["linear2"]
    assert torch.equal(first.V, second.U.T) and torch.equal(first.U, second.V.T)
    with pytest.raises(ValueError, match="linear2"):
        tms_model("~decompose.modules.linear2")


def test_binomial_jitter_is_on_only_with_noise(tms_model):
    model = tms_model("decompose.sampling=binomial", "decompose.sigmoid=normal")
    noise = StepRandomness(0, 0, 0, 1, 8, torch.device("cpu")).batch_stream("n")
    _, inputs = model.run_target(torch.rand(8, 5))
    with_noise, without = (model.causal_importances(inputs, n)["linear1"] for n in (noise, None))
    g = without.pre_sigmoid
    torch.testing.assert_close(without.lower, torch.sigmoid(g))
    u = (1.05 * g - torch.logit(with_noise.lower)) / 0.05
    assert u.min() > -1e-3 and u.max() < 1 + 1e-3 and u.std() > 0.1
