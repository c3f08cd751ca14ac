"""Whatever is taken away from the step's speed, it computes the same."""

from contextlib import nullcontext

import pytest
import torch

from benchmarks.ablation import WITHOUT
from benchmarks.step import composed, with_random_target
from spd_core.step import optimisation_step
from spd_core.train import build_optimizer

pytestmark = pytest.mark.slow
SMALL = {
    "tms_5-2": ["train.batch_size=96"],
    "resid_mlp2": ["train.batch_size=96", "target.n_features=10", "target.d_embed=12",
                   "decompose.modules={layers.*.mlp_in:9,layers.*.mlp_out:9}",
                   "eval.metrics.identity_ci_error=null"],
}  # fmt: skip


@pytest.mark.parametrize("experiment", SMALL)
@pytest.mark.parametrize("part", WITHOUT)
def test_a_step_without_it_computes_the_same(experiment, part, one_process):
    values = []
    for without in (lambda _: nullcontext(), WITHOUT[part]):
        config, data = composed(experiment, SMALL[experiment])
        d = with_random_target(config, data, one_process)
        optimizer = build_optimizer(config, d.model)
        with without(d):
            results = [optimisation_step(d, optimizer, i, i, lambda _batch: {}) for i in range(2)]
        values.append([result.values() for result in results])
    for whole, other in zip(*values, strict=True):
        assert other == pytest.approx(whole, rel=1e-3, abs=1e-7)


def test_every_part_is_really_taken_away(one_process):
    """Nothing of it is left: the step runs other code."""
    config, data = composed("resid_mlp2", SMALL["resid_mlp2"])
    d = with_random_target(config, data, one_process)
    for part, without in WITHOUT.items():
        optimizer = build_optimizer(config, d.model)
        calls = []
        for context in (nullcontext(), without(d)):
            with context, torch.profiler.profile() as profile:
                optimisation_step(d, optimizer, 0, 0, lambda _batch: {})
            calls.append({event.key: event.count for event in profile.key_averages()})
        assert calls[0] != calls[1], part
