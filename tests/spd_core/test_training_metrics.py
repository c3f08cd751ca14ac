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
from spd_core.data.batches import Decomposition, training_batches
from spd_core.distributed import Dist
from spd_core.metrics import Sums, add, means
from spd_core.metrics.ci import l0_sums, n_alive, observe_alive
from spd_core.run_dir import read_metrics
from spd_core.train import build_model, faithfulness_warm_up, train

THRESHOLD, C = 0.25, 5
ONE = Dist(0, 1, torch.device("cpu"))


def options(n_examples):
    return AliveComponentsConfig(when="fast", threshold=THRESHOLD, n_examples=n_examples)


def never(n_examples, *names):
    """No subcomponent of these modules was ever important."""
    return {name: torch.full((C,), n_examples) for name in names}


def importances(generator, *positions):
    """Rarely above the threshold."""
    lower = torch.rand(*positions, C, generator=generator) ** 40
    return {"a": CausalImportance(lower, lower, "leaky_hard")}


def above(ci):
    return (ci["a"].lower.numpy() > THRESHOLD).reshape(-1, C)


@given(st.integers(0, 99), st.integers(1, 40), st.sampled_from([(6,), (2, 3), (1,)]))
def test_alive_means_important_within_the_last_examples(seed, n_examples, positions):
    """Exact where n_examples is whole batches; else it may look into the oldest one as a whole."""
    generator, config = torch.Generator().manual_seed(seed), options(n_examples)
    ago, history, size = never(n_examples, "a"), np.zeros((0, C), bool), int(np.prod(positions))
    for _ in range(10):
        assert n_alive(ago, config, ONE) == {"a": history[-n_examples:].any(0).sum()} or (
            n_examples % size
        )
        ci = importances(generator, *positions)
        observe_alive(ago, ci, config, ONE)
        history = np.concatenate([history, above(ci)])
        least = history[-n_examples:].any(0).sum()
        most = history[-(n_examples + size - 1) :].any(0).sum()
        assert least <= n_alive(ago, config, ONE)["a"] <= most


def test_a_value_at_the_threshold_is_not_important():
    ago, lower = never(8, "a"), torch.full((4, C), THRESHOLD)
    observe_alive(ago, {"a": CausalImportance(lower, lower + 1, "leaky_hard")}, options(8), ONE)
    assert n_alive(ago, options(8), ONE) == {"a": 0}


def test_a_module_at_fewer_positions_forgets_as_fast_as_the_others():
    """Position embeddings run once for the 4 examples of a batch; all last 2 batches of 4 x 3."""
    ago, counts = never(24, "tokens", "positions"), []
    for value in (1.0, 0.0, 0.0):
        lower = {"tokens": torch.full((4, 3, C), value), "positions": torch.full((1, 3, C), value)}
        ci = {n: CausalImportance(v, v, "leaky_hard") for n, v in lower.items()}
        observe_alive(ago, ci, options(24), ONE)
        counts.append(n_alive(ago, options(24), ONE))
    assert counts == [{"tokens": n, "positions": n} for n in (C, C, 0)]


@given(st.integers(0, 99), st.integers(1, 9))
def test_a_loaded_state_goes_on_as_the_saved_one(seed, n_batches):
    generator, ago, config = torch.Generator().manual_seed(seed), never(12, "a"), options(12)
    for _ in range(n_batches):
        observe_alive(ago, importances(generator, 4), config, ONE)
    loaded = distributed.over_ranks("min", ago, ONE)
    for _ in range(4):
        ci = importances(generator, 4)
        for each in (ago, loaded):
            observe_alive(each, ci, config, ONE)
        assert n_alive(ago, config, ONE) == n_alive(loaded, config, ONE)


def rank_main(rank, port, queue):
    """Six steps of two microbatches; what is alive after each, and the state that is saved."""
    torch.set_num_threads(1)
    dist = distributed.init(rank, 2, rank, f"127.0.0.1:{port}", "cpu")
    generator, config = torch.Generator().manual_seed(rank), options(24)
    ago, counts, seen = never(24, "a"), [], []
    for _ in range(6):
        for _ in range(2):
            ci = importances(generator, 3)
            observe_alive(ago, ci, config, dist)
            seen.append(above(ci).tolist())
        counts.append(n_alive(ago, config, dist)["a"])
    state = {name: t.tolist() for name, t in distributed.over_ranks("min", ago, dist).items()}
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
    assert means(distributed.over_ranks("sum", sums, ONE)) == {
        f"ci_l0_{THRESHOLD}/a": pytest.approx(l0),
        f"ci_l0_{THRESHOLD}/all": pytest.approx(l0),
    }


def test_ci_l0_of_the_first_training_step(make_config, make_run_dir):
    """At logged steps and in evaluations, by module and by group, whatever the microbatches."""
    groups = "+eval.metrics.ci_l0.groups={both:['linear*'],first:['*1']}"
    config = make_config(
        groups,
        "eval.metrics.ci_l0.threshold=0.02",
        "train.microbatch_size=8",
        "track.log_every=3",
        "decompose.start=random",
    )
    run_dir = make_run_dir("run")
    train(config, run_dir, ONE, lambda _step, _values: False)
    model = build_model(config, run_dir.targets, ONE, Console(quiet=True))
    faithfulness_warm_up(config, model)
    batches, n_micro = training_batches(Decomposition(config, model, ONE, None), 0)
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
