import pytest
import torch

from spd_analysis.observe import observe
from spd_core.data.batches import Decomposition
from spd_core.load import load_run


@pytest.mark.parametrize("sampling", ["continuous", "binomial"])
def test_importances_are_the_models_without_noise(sampling, trained, one_process):
    run = load_run(trained("a_run", f"decompose.sampling={sampling}").path)
    d = Decomposition(run.config, run.model, one_process, None)
    seen = observe(d, 3, 0, 20, "clustering")
    W, b = run.model.target.linear1.weight, run.model.target.linear2.bias
    torch.testing.assert_close(seen.target_out, (seen.examples @ W.T @ W + b).relu())
    assert seen.positions == (20,)
    inputs = {"linear1": seen.examples, "linear2": seen.examples @ W.T}
    for name, x in inputs.items():
        g = run.model.ci_fns[name](x, x @ run.model.components[name].V)
        torch.testing.assert_close(seen.ci[name], g.clamp(0, 1))


def test_batches_are_told_apart_by_seed_step_and_purpose(trained, one_process):
    run = load_run(trained("a_run").path)
    d = Decomposition(run.config, run.model, one_process, None)
    addresses = [(0, 0, "a"), (0, 1, "a"), (1, 0, "a"), (0, 0, "b")]
    batches = [observe(d, seed, step, 30, why).examples for seed, step, why in addresses]
    for i, batch in enumerate(batches):
        assert torch.equal(batch, observe(d, *addresses[i][:2], 30, addresses[i][2]).examples)
        assert not any(torch.equal(batch, other) for other in batches[:i])
