"""Steps as they are recorded: on a CPU what a recording does, on a GPU the recording itself."""

from functools import partial

import pytest
import torch

from benchmarks.naive import losses as naive_losses
from spd_core.component_model import ComponentModel
from spd_core.data.batches import Decomposition, draw_examples, training_batches
from spd_core.distributed import Dist
from spd_core.fast.graph import StepGraph, step_taker
from spd_core.randomness import StepRandomness
from spd_core.step import Scheduled, accumulate_gradients, descend, optimisation_step, scheduled
from spd_core.targets.train_target import untrained_target
from spd_core.train import build_optimizer
from spd_launch.compose import compose
from spd_launch.validate import validate

CPU, STEP = torch.device("cpu"), 4
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
EXPERIMENTS = ("tms_5-2", "resid_mlp2", "ih")


def decomposition(experiment, dist, *overrides):
    given = [f"+experiment={experiment}", "cluster=local", "train.batch_size=32", *overrides]
    config = validate(compose(given, multirun=False)[0].values)
    target = untrained_target(config, None, torch.Generator().manual_seed(0))
    model = ComponentModel(target, config.decompose, 0).to(dist.device)
    return Decomposition(config, model, dist, None)


def observe(_batch, _logged=False):
    return {}


def recorded_inputs(config, step):
    """What a recorded step reads: tensors in place of numbers."""
    now = scheduled(config, step)
    coeffs, p = ({n: torch.tensor(v) for n, v in of.items()} for of in (now.coeffs, now.p))
    return Scheduled(coeffs, p), torch.tensor(step)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_recorded_step_computes_what_the_formulas_say(experiment, one_process):
    small = ["decompose.ci_fn.hidden=[8]", "losses.importance_minimality.p=1.0"]
    d = decomposition(experiment, one_process, *(small if experiment == "ih" else []))
    now, counter = recorded_inputs(d.config, STEP)
    batches, n_micro = training_batches(d, -1, counter)
    found, _, _ = accumulate_gradients(d, batches, n_micro, now, observe)
    gradients = {name: p.grad for name, p in d.model.trained_parameters().items()}
    d.model.zero_grad()
    wanted = naive_losses(d.config, d.model, None, STEP)
    coeffs = scheduled(d.config, STEP).coeffs
    sum(coeffs[name] * loss for name, loss in wanted.items()).backward()
    for name, loss in wanted.items():
        torch.testing.assert_close(found[name], loss.detach(), rtol=1e-4, atol=1e-7)
    for name, p in d.model.trained_parameters().items():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("experiment", ["tms_5-2", "resid_mlp2"])
@pytest.mark.parametrize("examples_given", [False, True])
def test_microbatches_of_a_recorded_step_change_nothing(experiment, examples_given, one_process):
    results = []
    for size in (32, 8):
        d = decomposition(experiment, one_process, f"train.microbatch_size={size}")
        now, counter = recorded_inputs(d.config, STEP)
        examples = None
        if examples_given:
            place = StepRandomness(d.config.seed, STEP, 0, 1, 32, CPU)
            examples = draw_examples(d.config, None, place, "train")
        optimizer = build_optimizer(d.config, d.model)
        result = descend(d, optimizer, -1, now, observe, (counter, examples))
        results.append(result.values())
    whole, parts = results
    assert whole == pytest.approx(parts, rel=1e-4)


def test_a_cpu_takes_steps_one_by_one(one_process):
    taken = []
    for how in ("alone", "taker"):
        d = decomposition("tms_5-2", one_process)
        optimizer = build_optimizer(d.config, d.model)
        if how == "alone":
            result = optimisation_step(d, optimizer, STEP, STEP, observe)
        else:
            result = step_taker(d, optimizer, observe)(STEP, STEP, True)
        taken.append(result.values())
    assert taken[0] == taken[1]


# ---------------------------------------------------------------- on a GPU


def n_important(batch, logged):
    return {"n": sum((ci.lower > 0.1).sum() for ci in batch.ci.values())} if logged else {}


@needs_gpu
@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("size", [32, 8])
def test_a_graph_takes_the_steps_that_would_have_been_taken(experiment, size):
    """Also with a coefficient that changes, and what is observed now and then."""
    dist, found = Dist(0, 1, torch.device("cuda", 0)), []
    falling = "{kind:linear,start:1e-2,end:1e-3,warmup_fraction:0.0}"
    overrides = [f"train.microbatch_size={size}", f"losses.importance_minimality.coeff={falling}"]
    for how in ("graph", "eager"):
        d = decomposition(experiment, dist, "train.steps=8", *overrides)
        optimizer = build_optimizer(d.config, d.model)
        graph, values = StepGraph(d, optimizer, n_important), []
        for step in range(8):
            logged = step % 3 == 0
            if how == "graph":
                result = graph(step, step, logged)
            else:
                watch = partial(n_important, logged=logged)
                result = optimisation_step(d, optimizer, step, step, watch)
            values.append([result.values(), {n: v.item() for n, v in result.observed.items()}])
        found.append((values, [p.detach().clone() for p in d.model.trained_parameters().values()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@needs_gpu
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_no_step_waits_for_the_gpu(experiment):
    d = decomposition(experiment, Dist(0, 1, torch.device("cuda", 0)))
    optimizer = build_optimizer(d.config, d.model)
    for step in range(2):
        optimisation_step(d, optimizer, step, step, observe)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimisation_step(d, optimizer, 2, 2, observe)
    finally:
        torch.cuda.set_sync_debug_mode("default")
