import pytest
import torch
from torch import nn

from spd_core.component_model import ComponentModel
from spd_core.data.batches import Decomposition
from spd_core.data.start import start_from_examples

MODULES = {"linear1": 6, "linear2": 6}


def started(config, model, dist, tmp_path):
    start_from_examples(Decomposition(config, model, dist, tmp_path))
    return model.components


def test_each_subcomponent_is_what_the_module_does_to_one_example(
    make_config, tms_model, one_process, tmp_path
):
    only_one = "data.generation=exactly_one_active"
    model = tms_model(only_one)
    components = started(make_config(only_one), model, one_process, tmp_path)
    first, second, W = components["linear1"], components["linear2"], model.target.linear1.weight
    # With one feature on, V reads that feature alone.
    on = first.V.argmax(0)
    length = (W[:, on].norm(dim=0) * 5 / 6) ** 0.5
    assert torch.allclose(first.V, torch.eye(5)[:, on] * length)
    assert torch.allclose(first.U, W[:, on].T * 5 / 6 / length[:, None])
    assert torch.allclose(first.V.norm(dim=0), first.U.norm(dim=1))
    # The shipped config ties the two layers.
    assert torch.equal(second.V, first.U.T)
    assert torch.equal(second.U, first.V.T)


def test_inputs_of_zero_do_not_count(make_config, tms_model, one_process, tmp_path):
    for seed in range(5):
        config = make_config(f"seed={seed}", "decompose.tied=[]")
        components = started(config, tms_model("decompose.tied=[]"), one_process, tmp_path)
        for module in components.values():
            assert (module.V.norm(dim=0) > 0.1).all()


def test_seeds_differ_and_one_seed_repeats_itself(make_config, tms_model, one_process, tmp_path):
    V = [
        started(make_config(f"seed={s}"), tms_model(), one_process, tmp_path)["linear1"].V.detach()
        for s in (0, 0, 1)
    ]
    assert torch.equal(V[0], V[1])
    assert not torch.equal(V[0], V[2])


def test_many_subcomponents_of_even_inputs_add_up_to_the_weight(
    make_config, tms_model, one_process, tmp_path
):
    many = ("decompose.modules={linear1:3000,linear2:3000}", "data.generation=exactly_one_active")
    config = make_config("train.batch_size=4096", *many)
    model = tms_model(*many)
    linear1 = started(config, model, one_process, tmp_path)["linear1"]
    assert torch.allclose((linear1.V @ linear1.U).T, model.target.linear1.weight, atol=0.1)


def test_they_add_up_to_the_weight_where_inputs_span_a_part_of_the_space(
    make_config, one_process, tmp_path
):
    net = nn.Sequential(nn.Linear(5, 40, bias=False), nn.Linear(40, 3))
    net.requires_grad_(False)[0].weight.copy_(torch.linalg.qr(torch.randn(40, 5))[0])
    config = make_config("data.generation=exactly_one_active")
    decompose = config.decompose.model_copy(update={"modules": {"1": 3000}, "tied": []})
    config = config.model_copy(update={"decompose": decompose})
    last = started(config, ComponentModel(net, decompose, 0), one_process, tmp_path)["1"]
    on_it = net[1].weight @ net[0].weight
    assert torch.allclose((last.V @ last.U).T @ net[0].weight, on_it, atol=0.05)


def test_an_embedding_reads_single_tokens(make_config, one_process, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 5)

        def forward(self, x):
            return self.head(self.embed((x.cumsum(-1) * 7).long() % 7))

    config, net = make_config(), Net()
    decompose = config.decompose.model_copy(update={"modules": {"*": 6}, "tied": []})
    config = config.model_copy(update={"decompose": decompose})
    components = started(config, ComponentModel(net, decompose, 0), one_process, tmp_path)
    token = components["embed"].V.argmax(0)
    assert (components["embed"].V.count_nonzero(dim=0) == 1).all()
    each = components["embed"].V[token, range(6)][:, None] * components["embed"].U
    assert torch.allclose(each, net.embed.weight[token] * 7 / 6)
    assert components["head"].V.shape == (3, 6)


def test_a_module_without_input_is_named(make_config, tms_model, one_process, tmp_path):
    model = tms_model()
    nn.init.zeros_(model.target.linear1.weight)
    with pytest.raises(ValueError, match="start=examples: the input of 'linear2' is zero"):
        started(make_config(), model, one_process, tmp_path)
