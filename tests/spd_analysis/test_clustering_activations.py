import numpy as np
import pytest
import torch

from spd_analysis.clustering.activations import collect
from spd_analysis.clustering.config import DEFAULT, load_config
from spd_analysis.observe import observe
from spd_core.data.batches import Decomposition
from spd_core.load import load_run

# 30 examples are no whole number of bytes.
SMALL = ("data={n_samples: 61, batch_size: 30}", "seed=5")


@pytest.fixture
def decomposition(trained, one_process):
    run = load_run(trained("a_run").path)
    for name in ("linear1", "linear2"):  # of 6 subcomponents, 2 never matter and 1 a little
        last = run.model.ci_fns[name].biases[-1].data
        last[:] = torch.tensor([0.3, 0.2, 0.4, 0.3, -9.0, -9.0]).reshape(last.shape)
        run.model.ci_fns[name].weights[-1].data[4:] = 0
        run.model.ci_fns[name].weights[-1].data[3], last[3] = 0, 0.005
    return Decomposition(run.config, run.model, one_process, None)


def importances(d, modules):
    batches = [observe(d, 5, step, 30, "clustering").ci for step in range(3)]
    return np.concatenate([np.concatenate([b[m].numpy() for m in modules], 1) for b in batches])


def unpack(activations, step_size=30):
    """Samples of every batch, without those that fill up its last byte."""
    n = activations.values.shape[1]
    octets = activations.values.T.copy().view(np.uint8).reshape(n, -1)
    bits = np.unpackbits(octets, axis=1).T
    per_batch = 8 * -(-step_size // 8)
    assert not bits[3 * per_batch :].any()
    parts = bits[: 3 * per_batch].reshape(3, per_batch, -1)
    assert not parts[:, step_size:].any()
    return parts[:, :step_size].reshape(-1, n)


def test_bits_are_where_importances_are_above_the_threshold(decomposition):
    config = load_config(DEFAULT, [*SMALL, "activation_threshold=0.25"])
    activations = collect(decomposition, config)
    values = importances(decomposition, ["linear1", "linear2"])
    alive = values.max(0) > 0.001
    assert activations.n_dead == 4 and alive.sum() == 8
    assert activations.n_samples == len(values) == 90
    names = [f"linear{m}:{i}" for m in (1, 2) for i in (0, 1, 2, 3)]
    assert activations.subcomponents == names
    assert (unpack(activations) == (values[:, alive] > 0.25)).all()
    assert (activations.total(activations.values) == (values[:, alive] > 0.25).sum(0)).all()


def test_raw_values_and_chosen_modules(decomposition):
    config = load_config(DEFAULT, [*SMALL, "activation_threshold=null", 'modules=["*2"]'])
    activations = collect(decomposition, config)
    values = importances(decomposition, ["linear2"])[:, :4]
    assert activations.kind == "raw" and activations.n_dead == 2
    assert (activations.values == values).all()
    assert activations.total(activations.values) == pytest.approx(values.sum(0))


def test_another_seed_is_other_data(decomposition):
    first, again, other = (
        collect(decomposition, load_config(DEFAULT, [*SMALL, f"seed={seed}"])).values
        for seed in (5, 5, 6)
    )
    assert (first == again).all() and (first != other).any()


def test_a_subcomponent_below_filter_dead_threshold_is_dead(decomposition):
    config = load_config(DEFAULT, [*SMALL, "filter_dead_threshold=0.01"])
    assert collect(decomposition, config).n_dead == 6


@pytest.mark.parametrize("override, message", [
    ('modules=["nothing*"]', r"modules=\['nothing\*'\] matches none of the decomposed linear1, "),
    ("filter_dead_threshold=1.0", "no subcomponent of linear1, linear2 .* nothing to cluster"),
])  # fmt: skip
def test_nothing_to_look_at(override, message, decomposition):
    with pytest.raises(ValueError, match=message):
        collect(decomposition, load_config(DEFAULT, [*SMALL, override]))
