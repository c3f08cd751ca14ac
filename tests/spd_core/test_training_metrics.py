"""What is gathered while training: alive components, and ci_l0 at logged steps."""

import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_distributed import free_port

from spd_core import distributed
from spd_core.ci_fns import CausalImportance
from spd_core.config.metrics import AliveComponentsConfig, CiL0Config
from spd_core.data.batches import training_batches
from spd_core.distributed import Dist
from spd_core.metrics import Sums, add, means, over_ranks
from spd_core.metrics.ci import AliveComponents, l0_sums
from spd_core.run_dir import read_metrics
from spd_core.train import build_model, faithfulness_warm_up, train

THRESHOLD, C = 0.25, 5
ONE = Dist(0, 1, torch.device("cpu"))


def alive_components(n_examples):
    config = AliveComponentsConfig(when="fast", threshold=THRESHOLD, n_examples=n_examples)
    return AliveComponents(config, {"a": torch.full((C,), n_examples)})


def importances(generator, *positions):
    """Rarely above the threshold."""
    lower = torch.rand(*positions, C, generator=generator) ** 40
    return {"a": CausalImportance(lower, lower, lower)}


def above(ci):
    return (ci["a"].lower.numpy() > THRESHOLD).reshape(-1, C)


@given(st.integers(0, 99), st.integers(1, 40), st.sampled_from([(6,), (2, 3), (1,)]))
def test_alive_means_important_within_the_last_examples(seed, n_examples, positions):
    """Exact where n_examples is whole batches; else it may look into the oldest one as a whole."""
    generator, alive = torch.Generator().manual_seed(seed), alive_components(n_examples)
    history, size = np.zeros((0, C), bool), int(np.prod(positions))
    for _ in range(10):
        assert alive.n_alive(ONE) == {"a": history[-n_examples:].any(0).sum()} or (
            n_examples % size
        )
        ci = importances(generator, *positions)
        alive.observe(ci, ONE)
        history = np.concatenate([history, above(ci)])
        least = history[-n_examples:].any(0).sum()
        most = history[-(n_examples + size - 1) :].any(0).sum()
        assert least <= alive.n_alive(ONE)["a"] <= most


def test_a_value_at_the_threshold_is_not_important():
    alive = alive_components(8)
    lower = torch.full((4, C), THRESHOLD)
    alive.observe({"a": CausalImportance(lower, lower + 1, lower + 1)}, ONE)
    assert alive.n_alive(ONE) == {"a": 0}


def test_a_module_at_fewer_positions_forgets_as_fast_as_the_others():
    """Position embeddings run once for the 4 examples of a batch; all last 2 batches of 4 x 3."""
    config = AliveComponentsConfig(when="fast", threshold=THRESHOLD, n_examples=24)
    alive = AliveComponents(config, {n: torch.full((C,), 24) for n in ("tokens", "positions")})
    counts = []
    for value in (1.0, 0.0, 0.0):
        lower = {"tokens": torch.full((4, 3, C), value), "positions": torch.full((1, 3, C), value)}
        alive.observe({n: CausalImportance(v, v, v) for n, v in lower.items()}, ONE)
        counts.append(alive.n_alive(ONE))
    assert counts == [{"tokens": n, "positions": n} for n in (C, C, 0)]


@given(st.integers(0, 99), st.integers(1, 9))
def test_a_loaded_state_goes_on_as_the_saved_one(seed, n_batches):
    generator, alive = torch.Generator().manual_seed(seed), alive_components(12)
    for _ in range(n_batches):
        alive.observe(importances(generator, 4), ONE)
    loaded = alive_components(12)
    loaded.load(alive.tensors(ONE))
    for _ in range(4):
        ci = importances(generator, 4)
        for each in (alive, loaded):
            each.observe(ci, ONE)
        assert alive.n_alive(ONE) == loaded.n_alive(ONE)


def rank_main(rank, port, queue):
    """Six steps of two microbatches; what is alive after each, and the state that is saved."""
    torch.set_num_threads(1)
    dist = distributed.init(rank, 2, rank, "127.0.0.1", port, "cpu")
    generator, alive, counts, seen = (
        torch.Generator().manual_seed(rank),
        alive_components(24),
        [],
        [],
    )
    for _ in range(6):
        for _ in range(2):
            ci = importances(generator, 3)
            alive.observe(ci, dist)
            seen.append(above(ci).tolist())
        counts.append(alive.n_alive(dist)["a"])
    state = {name: t.tolist() for name, t in alive.tensors(dist).items()}
    distributed.shutdown()
    queue.put((rank, seen, counts, state))


def test_alive_on_any_rank_is_alive():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "spd_core.train"])
    queue, port = context.Queue(), free_port()
    ranks = [context.Process(target=rank_main, args=(rank, port, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    (_, seen, counts, state), (_, seen_1, counts_1, state_1) = sorted(
        queue.get(timeout=90) for _ in ranks
    )
    for process in ranks:
        process.join(timeout=10)
    assert counts == counts_1 and state == state_1 and len(set(counts)) > 1
    both = np.array(seen) | np.array(seen_1)  # microbatch, position, component
    for step, count in enumerate(counts, start=1):
        last = both[: 2 * step][-4:]  # 4 microbatches of 3 positions on 2 ranks are 24 examples
        assert count == last.any((0, 1)).sum()


def test_ci_l0_sums_over_microbatches():
    config = CiL0Config(when="fast", threshold=THRESHOLD, groups={"all": ["*"]})
    sums, generator = Sums(), torch.Generator().manual_seed(0)
    batches = [importances(generator, 4, 2) for _ in range(3)]
    for ci in batches:
        add(sums, l0_sums(ci, config))
    l0 = np.concatenate([above(ci) for ci in batches]).sum(1).mean()
    assert l0 > 0
    assert means(over_ranks(distributed.all_sum, sums, ONE)) == {
        f"ci_l0_{THRESHOLD}/a": pytest.approx(l0),
        f"ci_l0_{THRESHOLD}/all": pytest.approx(l0),
    }


def test_ci_l0_of_the_first_training_step(make_config, make_run_dir):
    """At logged steps and in evaluations, by module and by group, whatever the microbatches."""
    groups = "+eval.metrics.ci_l0.groups={both:['linear*'],first:['*1']}"
    config = make_config(
        groups, "eval.metrics.ci_l0.threshold=0.02", "train.microbatch_size=8", "track.log_every=3"
    )
    run_dir = make_run_dir("run")
    train(config, run_dir, ONE, lambda: False, 1, None)
    model = build_model(config, run_dir.targets, ONE, Console(quiet=True))
    faithfulness_warm_up(config, model)
    batches, n_micro = training_batches(config, model, 0, ONE)
    lower = [{n: ci.lower.detach().numpy() for n, ci in batch.ci.items()} for batch in batches()]
    assert n_micro == len(lower) == 4
    one, two = (
        np.mean([(part[n] > 0.02).sum(1).mean() for part in lower]) for n in ("linear1", "linear2")
    )
    records = read_metrics(run_dir)
    wanted = {"linear1": one, "linear2": two, "both": one + two, "first": one}
    for name, value in wanted.items():
        assert records[0][f"ci_l0_0.02/{name}"] == pytest.approx(value)
    assert [r["step"] for r in records if "ci_l0_0.02/both" in r] == [1, 3, 6]
    assert [r["step"] for r in records if "eval/ci_l0_0.02/both" in r] == [3, 6]
