from weakref import ref

import pytest
import torch

from spd_core.data.batches import Decomposition, training_batches
from spd_core.distributed import Dist

CPU = torch.device("cpu")
LIVELY = "data.feature_probability=0.6"


def cut(make_config, model, world, size):
    """The batches of all ranks, one after the other."""
    config = make_config(LIVELY, f"dp={world}", f"train.microbatch_size={size}")
    for rank in range(world):
        batches, n_micro = training_batches(
            Decomposition(config, model, Dist(rank, world, CPU), None), 2
        )
        parts = list(batches())
        assert len(parts) == n_micro
        yield from parts


@pytest.mark.parametrize("sampling", ["continuous", "binomial"])
@pytest.mark.parametrize("world, size, n", [(1, 8, 4), (2, "null", 2), (2, 4, 8), (4, 1, 32)])
def test_ranks_and_microbatches_cut_the_same_batch(
    world, size, n, sampling, make_config, tms_model
):
    sampling = f"decompose.sampling={sampling}"
    model = tms_model(sampling, "decompose.sigmoid=normal")
    (whole,) = cut(make_config, model, 1, "null")
    parts = list(cut(make_config, model, world, size))
    assert len(parts) == n and {len(part.examples) for part in parts} == {32 // n}
    assert torch.equal(torch.cat([part.examples for part in parts]), whole.examples)
    torch.testing.assert_close(torch.cat([part.target_out for part in parts]), whole.target_out)
    for name, ci in whole.ci.items():
        torch.testing.assert_close(torch.cat([part.ci[name].lower for part in parts]), ci.lower)


@pytest.mark.parametrize("size", ["8", "null"])
def test_every_call_gives_the_same_batches(size, make_config, tms_model, one_process):
    """Made anew, unless somebody holds them."""
    config = make_config(LIVELY, f"train.microbatch_size={size}")
    batches, _ = training_batches(Decomposition(config, tms_model(), one_process, None), 2)
    examples, held = [batch.examples for batch in batches()], list(batches())
    for first, second, again in zip(examples, held, batches(), strict=True):
        assert first is not second.examples and torch.equal(first, second.examples)
        assert again is second
    gone = [ref(batch) for batch in held]
    del held, second, again
    assert [at() for at in gone] == [None] * len(gone)


def test_steps_have_their_own_examples(make_config, tms_model, one_process):
    d = Decomposition(make_config(LIVELY), tms_model(), one_process, None)
    steps = [next(iter(training_batches(d, step)[0]())) for step in (0, 1)]
    values = torch.cat([batch.examples[batch.examples > 0] for batch in steps])
    assert len(values.unique()) == len(values)


@pytest.mark.parametrize("kind, dtype", [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_is_on_only_where_it_is_asked_for(kind, dtype, make_config, one_process):
    with Decomposition(make_config(f"train.autocast={kind}"), None, one_process, None).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_importances_are_float32_under_autocast(make_config, tms_model, one_process):
    config = make_config(LIVELY, "train.autocast=bf16")
    with Decomposition(config, None, one_process, None).autocast():
        batches, _ = training_batches(Decomposition(config, tms_model(), one_process, None), 2)
    (batch,) = batches()
    for ci in batch.ci.values():
        assert {ci.lower.dtype, ci.upper.dtype} == {torch.float32}
