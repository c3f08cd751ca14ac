import pytest
import torch

from benchmarks.naive import losses
from spd_core.component_model import ComponentModel
from spd_core.data.batches import Decomposition, training_batches
from spd_core.step import accumulate_gradients, scheduled
from spd_core.targets.train_target import untrained_target
from spd_launch.compose import compose
from spd_launch.validate import validate


@pytest.mark.parametrize("experiment, overrides", [
    ("tms_5-2", []),
    ("tms_5-2", ["decompose.ci_fn.kind=vector_mlp"]),
    ("resid_mlp2", []),
    ("ih", ["decompose.ci_fn.hidden=[8]", "losses.importance_minimality.p=1.0"]),
])  # fmt: skip
def test_the_core_computes_what_the_formulas_say(experiment, overrides, one_process):
    """Every loss and gradient, of a batch whose examples are in part silent."""
    given = [f"+experiment={experiment}", "cluster=local", "train.batch_size=32", *overrides]
    config = validate(compose(given, multirun=False)[0].values)
    target = untrained_target(config, None, torch.Generator().manual_seed(0))
    # Not step 3: there, a pre-sigmoid value of ih is 2e-8, on either side of the kink at 0.
    model, step = ComponentModel(target, config.decompose, 0), 4
    batches, n_micro = training_batches(Decomposition(config, model, one_process, None), step)
    d = Decomposition(config, model, one_process, None)
    found, _, _ = accumulate_gradients(
        d, batches, n_micro, scheduled(config, step), lambda _batch: {}
    )
    gradients = {name: p.grad for name, p in model.trained_parameters().items()}
    model.zero_grad()
    wanted = losses(config, model, None, step)
    coeffs = scheduled(config, step).coeffs
    sum(coeffs[name] * loss for name, loss in wanted.items()).backward()
    torch.testing.assert_close(
        found, {n: v.detach() for n, v in wanted.items()}, rtol=1e-4, atol=1e-7
    )
    for name, p in model.trained_parameters().items():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-4 * scale)
