"""The formulas of docs/performance.md against what a step of two ranks really does."""

import pytest
import torch

from benchmarks import scaling
from benchmarks.scaling import measure
from benchmarks.step import composed, with_random_target
from spd_core.distributed import Dist

SMALL = {
    "resid_mlp2": ["train.batch_size=256", "decompose.modules[layers.*.mlp_in]=30"],
    "ss_llama_simple": ["data=stories", "train.batch_size=2", "data.seq_len=64",
                        "decompose.modules[h.*.attn.*_proj]=40",
                        "decompose.modules[h.*.mlp.*_proj]=24", "decompose.ci_fn.hidden=[50]"],
}  # fmt: skip


@pytest.mark.parametrize("experiment", SMALL)
def test_every_gradient_in_its_turn(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = composed(experiment, SMALL[experiment])
    d = with_random_target(config, data, Dist(0, 1, torch.device("cpu")))
    n_bytes = [p.nbytes for p in d.model.trained_parameters().values()]
    monkeypatch.setattr(scaling, "BUCKET", 1)
    assert scaling.bytes_of_gradients(scaling.sizes_of(d)) == n_bytes[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", SMALL)
def test_collectives_are_what_the_formula_says_and_products_nearly(experiment: str) -> None:
    found = measure(experiment, SMALL[experiment], dp=2, steps=2, n_threads=1)
    assert found["bytes"] == found["bytes_by_formula"]
    assert len(found["bytes"]) == {"resid_mlp2": 4, "ss_llama_simple": 3}[experiment]
    assert found["flops"] == pytest.approx(found["flops_by_formula"], rel=0.05)


def test_the_gradients_of_a_residual_mlp_by_hand() -> None:
    found = measure("resid_mlp2", ["train.batch_size=64"], dp=2, steps=1, n_threads=1)
    # C (d_in + d_out) of V and U, then a hidden layer of 256 with biases: twice in, twice out.
    per_layer = 2 * 400 * 1025 + 256 * (1001 + 26) + 2 * 400 * 257
    search, powers, losses = 4 * (4 * 400 + 4), 4 * (4 * 400 + 1), 2 * 4 * 3
    assert found["bytes"] == [search, powers, losses, 4 * 2 * per_layer]
