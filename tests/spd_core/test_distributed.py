"""Two and four real processes over gloo must compute what one computes."""

import multiprocessing
import socket
from pathlib import Path

import pytest
import torch

from spd_core import distributed
from spd_core.checkpoint import newest_valid_checkpoint
from spd_core.component_model import ComponentModel
from spd_core.distributed import Dist
from spd_core.evaluate import evaluate
from spd_core.randomness import stream
from spd_core.run_dir import RunDir, read_metrics, read_status
from spd_core.targets.tms import TMS
from spd_core.train import build_optimizer, optimisation_step, train

CPU = torch.device("cpu")
EVERY_LOSS = (
    "+losses.faithfulness.coeff=0.7",
    "+losses.unmasked_recon.coeff=0.3",
    "+losses.ci_masked_recon_layerwise.coeff=0.2",
    "+losses.stochastic_recon_subset={coeff:0.5,routing:{kind:uniform_k_subset}}",
    "+losses.ci_masked_recon_subset={coeff:0.5,routing:{kind:static_probability,p:0.4}}",
    "losses.importance_minimality={coeff:0.1,p:0.7,beta:0.5}",
)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def one_step(config, dist):
    """Losses, gradients and metrics of one step, from the same weights in every process."""
    target = TMS(config.target, stream(1, "test", device=CPU))
    model = ComponentModel(target, config.decompose, config.seed)
    step = optimisation_step(config, model, build_optimizer(config, model), dist, 2)
    losses, total, norms = step
    gradients = {n: p.grad for n, p in model.trained_parameters().items()}
    metrics = evaluate(config, model, 2, "slow", dist, Path("unused"))
    values = {"losses": losses, "total": total, "norms": norms, "gradients": gradients}
    return values | {"metrics": {k: torch.tensor(float(v)) for k, v in metrics.items()}}


def stopping_run(config, dist, folder):
    """Only the last rank is asked to stop, after three steps; all must."""
    asked = iter(range(1, 100))
    return train(
        config,
        RunDir(folder),
        dist,
        lambda: next(asked) >= 3 and dist.rank == dist.world_size - 1,
        1,
        None,
    )


def rank_main(rank, world, port, configs, folder, queue):
    torch.set_num_threads(1)
    dist = distributed.init(rank, world, rank, "127.0.0.1", port, "cpu")
    steps = [one_step(config, dist) for config in configs]
    flags = [distributed.any_rank(flag, dist) for flag in (rank == world - 1, False)]
    summed = distributed.all_sum(torch.tensor([rank + 1.0]), dist).item()
    outcome = stopping_run(configs[0], dist, folder)
    distributed.barrier(dist)
    distributed.shutdown()
    queue.put((rank, [tuple_free(s) for s in steps], flags, summed, outcome))


def tuple_free(tree):
    """Tensors as lists, which cross processes without shared memory."""
    if isinstance(tree, dict):
        return {key: tuple_free(value) for key, value in tree.items()}
    return tree.detach().tolist()


def run_ranks(world, configs, folder):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "spd_core.train"])
    queue, port = context.Queue(), free_port()
    arguments = (world, port, configs, folder, queue)
    ranks = [context.Process(target=rank_main, args=(r, *arguments)) for r in range(world)]
    for process in ranks:
        process.start()
    try:
        return [answer[1:] for answer in sorted(queue.get(timeout=90) for _ in ranks)]
    finally:
        for process in ranks:
            process.join(timeout=10)
            process.kill()


def close(tree, wanted, path=""):
    if isinstance(wanted, dict):
        assert tree.keys() == wanted.keys()
        for key in wanted:
            close(tree[key], wanted[key], f"{path}/{key}")
    else:
        got = torch.tensor(tree)
        torch.testing.assert_close(got, wanted.detach(), atol=1e-5, rtol=1e-5, msg=path)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_compute_what_one_process_computes(world, make_config, make_run_dir, one_process):
    anneal = ",p_anneal_start_frac:0.0,p_anneal_end_frac:1.0,p_anneal_final_p:0.5}"
    overrides = [o[:-1] + anneal if "minimality" in o else o for o in EVERY_LOSS]
    overrides += ["decompose.ci_fn.kind=shared_mlp", "target.init_bias_to_zero=false"]
    configs = [
        make_config(*overrides, f"decompose.sampling={sampling}", f"dp={world}")
        for sampling in ("continuous", "binomial")
    ]
    run_dir = make_run_dir("ranks")
    answers = run_ranks(world, configs, run_dir.path)
    for steps, flags, summed, outcome in answers:
        assert (flags, summed, outcome) == ([True, False], world * (world + 1) / 2, "stopped")
        for config, step in zip(configs, steps, strict=True):
            close(step, one_step(config, one_process))
    # A run that several ranks began is continued by one, and is the run of one process.
    assert read_status(run_dir).step == 3 == newest_valid_checkpoint(run_dir)[1]
    train(configs[0], run_dir, one_process, lambda: False, 2, None)
    alone = make_run_dir("alone")
    train(configs[0], alone, one_process, lambda: False, 1, None)
    for got, wanted in zip(read_metrics(run_dir), read_metrics(alone), strict=True):
        for key in wanted.keys() - {"time", "examples_per_s", "eval/seconds"}:
            assert got[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-5), key


def test_one_process_needs_no_group():
    dist = distributed.init(0, 1, 0, "", 0, "cpu")
    assert dist == Dist(0, 1, CPU) and dist.is_main
    assert not torch.distributed.is_initialized()
    x = torch.tensor([2.0], requires_grad=True)
    assert (
        distributed.all_sum(x, dist).item() == 2.0 and distributed.all_sum_with_grad(x, dist) is x
    )
    assert [distributed.any_rank(f, dist) for f in (True, False)] == [True, False]


def test_asking_for_a_gpu_that_is_not_there_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="device=cuda"):
        distributed.init(0, 1, 0, "", 0, "cuda")
