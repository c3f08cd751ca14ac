"""Two, three and four real processes over gloo must compute what one computes."""

import multiprocessing
import socket
import time
from glob import glob
from pathlib import Path
from queue import Empty

import pytest
import torch
from test_step import EVERY_LOSS, LIVELY, ON, OTHER_SCOPES, Positioned
from torch.multiprocessing.spawn import spawn

from spd_core import distributed
from spd_core.checkpoint import newest_valid_checkpoint
from spd_core.component_model import ComponentModel
from spd_core.data.batches import Decomposition, draw_examples, make_batch
from spd_core.distributed import Dist
from spd_core.evaluate import due_metrics, evaluate
from spd_core.fast import overlap
from spd_core.losses import prepare_step
from spd_core.randomness import StepRandomness, stream
from spd_core.run_dir import RunDir, read_metrics
from spd_core.schedule import annealed_ps
from spd_core.step import accumulate_gradients, optimisation_step, scheduled
from spd_core.targets.tms import TMS
from spd_core.train import build_optimizer, train

CPU = torch.device("cpu")
# Two, three and four divide the training batch, and none of them the batch of evaluation.
SIZES = ("train.batch_size=48", "eval.batch_size=35")
MULTIBATCH = "when:fast,init:random,step_size:0.2,n_steps:2,n_batches:2,routing:all"
CONFIGS = {
    "whole": (),
    "microbatches": ("train.microbatch_size=4", *OTHER_SCOPES),
    "binomial": ("decompose.sampling=binomial", "decompose.delta_component=false"),
    "kl": (
        "decompose.distance=kl",
        "decompose.ci_fn.kind=shared_mlp",
        "train.activation_checkpointing=ci_fns",
    ),
    "tokens": (
        "decompose.tied=[]",
        *("~decompose.modules.linear1", "~decompose.modules.linear2"),
        "+decompose.modules={tokens:4,positions:4,head:4}",
        *(f"eval.metrics.{name}=null" for name in ("identity_ci_error", "mmcs_ml2r")),
    ),
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Uneven(StepRandomness):
    """Rank 0 holds one example, and the last rank most of them."""

    @property
    def examples(self):
        last = self.part == self.n_parts - 1
        return range(self.part, self.batch_size if last else self.part + 1)


def draw(config, data, randomness, purpose):
    if "tokens" in config.decompose.modules:
        return randomness.batch_stream(purpose).integers(0, 9, 5)
    return draw_examples(config, data, randomness, purpose)


def fresh_model(config):
    if "tokens" in config.decompose.modules:
        torch.manual_seed(0)
        return ComponentModel(Positioned(), config.decompose, config.seed)
    target = TMS(config.target, stream(1, "test", device=CPU))
    return ComponentModel(target, config.decompose, config.seed)


def gradients_of(model):
    return {n: p.grad for n, p in model.trained_parameters().items()}


def one_step(config, dist):
    """Losses, gradients and metrics of one step, from the same weights in every process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spd_core.data.batches.draw_examples", draw)
        return one_step_of_drawn(config, dist)


def one_step_of_drawn(config, dist):
    model = fresh_model(config)
    optimizer = build_optimizer(config, model)
    d = Decomposition(config, model, dist, None)
    step = optimisation_step(d, optimizer, 2, 2, lambda _batch: {})
    values = {"losses": step.losses, "total": step.total, "norms": step.grad_norms}
    values["gradients"] = gradients_of(model)
    due = due_metrics(config, config.train.steps)
    metrics = evaluate(
        Decomposition(config, fresh_model(config), dist, None), 2, due, None, 1.0, Path("unused")
    )
    return values | {
        "metrics": {k: torch.tensor(v) for k, v in metrics.items() if "cost" not in k},
        "uneven": uneven_step(config, dist),
    }


def uneven_step(config, dist):
    """Losses, gradients and shared sources where ranks hold unequal numbers of examples."""
    model = fresh_model(config)
    randomness = Uneven(config.seed, 2, dist.rank, dist.world_size, 12, CPU)
    d = Decomposition(config, model, dist, None)
    batch = make_batch(d, randomness, "test")
    losses, _, _ = accumulate_gradients(
        d, lambda: [batch], 1, scheduled(config, 2), lambda _batch: {}
    )
    losses_of_config = config.losses.configured()
    p = annealed_ps(losses_of_config, 0.0)
    sources = prepare_step(d, losses_of_config, lambda: [batch], 1, p).sources
    return {"losses": losses, "gradients": gradients_of(model), "sources": sources}


def stopping_run(config, dist, folder):
    """Only the last rank is asked to stop, after two steps; after another one all must."""
    last = dist.rank == dist.world_size - 1
    return train(config, RunDir(folder), dist, lambda step, _values: last and step >= 2)


def rank_main(rank, world, port, configs, run_config, folder, queue):
    torch.set_num_threads(1)
    overlap.BUCKET = 1000  # else all gradients of so small models go in one collective
    dist = distributed.init(rank, world, rank, f"127.0.0.1:{port}", "cpu")
    steps = {name: one_step(config, dist) for name, config in configs.items()}
    flags = [distributed.any_rank(flag, dist) for flag in (rank == world - 1, False)]
    summed = distributed.all_reduce("sum", torch.tensor([rank + 1.0]), dist).item()
    outcome = stopping_run(run_config, dist, folder)
    distributed.barrier(dist)
    distributed.shutdown()
    queue.put((rank, as_lists(steps), flags, summed, outcome))


def as_lists(tree):
    """Tensors as lists, which cross processes without shared memory."""
    if isinstance(tree, dict):
        return {key: as_lists(value) for key, value in tree.items()}
    return tree.detach().tolist()


def run_ranks(world, configs, run_config, folder):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "spd_core.train"])
    queue, port = context.Queue(), free_port()
    arguments = (world, port, configs, run_config, folder, queue)
    ranks = [context.Process(target=rank_main, args=(r, *arguments)) for r in range(world)]
    for process in ranks:
        process.start()
    try:
        return [answer[1:] for answer in sorted(gathered(queue, ranks))]
    finally:
        for process in ranks:
            process.join(timeout=10)
            process.kill()


def gathered(queue, ranks):
    """One answer of each rank; fails at once where a rank does."""
    answers, deadline = [], time.monotonic() + 90
    while len(answers) < len(ranks) and time.monotonic() < deadline:
        try:
            answers.append(queue.get(timeout=0.5))
        except Empty:
            failed = [i for i, process in enumerate(ranks) if process.exitcode]
            assert not failed, f"ranks {failed} failed; their errors are in stderr"
    assert len(answers) == len(ranks), "no answer after 90 s"
    return answers


def close(tree, wanted, path=""):
    if isinstance(wanted, dict):
        assert tree.keys() == wanted.keys()
        for key in wanted:
            close(tree[key], wanted[key], f"{path}/{key}")
    else:
        got = torch.tensor(tree)
        torch.testing.assert_close(got, wanted.detach(), atol=1e-5, rtol=1e-5, msg=path)


@pytest.mark.parametrize("world", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_ranks_compute_what_one_process_computes(world, make_config, make_run_dir, one_process):
    shared = (*ON, *LIVELY, *SIZES, "target.init_bias_to_zero=false", f"dp={world}")
    shared += (f"+eval.metrics.pgd_multibatch_recon={{{MULTIBATCH}}}",)
    configs = {name: make_config(*shared, *own) for name, own in CONFIGS.items()}
    run_config, run_dir = make_config(*ON, *SIZES, f"dp={world}"), make_run_dir("ranks")
    answers = run_ranks(world, configs, run_config, run_dir.path)
    wanted = {}
    for name, config in configs.items():
        train_config = config.train.model_copy(update={"microbatch_size": None})
        undivided = config.model_copy(update={"train": train_config})
        wanted[name] = one_step(undivided, one_process)
        assert {*wanted[name]["losses"]} == {*EVERY_LOSS}
    for steps, flags, summed, outcome in answers:
        assert (flags, summed, outcome) == ([True, False], world * (world + 1) / 2, "stopped")
        close(steps, wanted)
        for name, step in steps.items():
            assert step["uneven"]["sources"] == answers[0][0][name]["uneven"]["sources"]
    # A run that several ranks began is continued by one, and is the run of one process.
    assert newest_valid_checkpoint(run_dir)[1] == 3
    train(run_config, run_dir, one_process, lambda _step, _values: False)
    alone = make_run_dir("alone")
    train(run_config, alone, one_process, lambda _step, _values: False)
    for got, wanted in zip(read_metrics(run_dir), read_metrics(alone), strict=True):
        timed = {k for k in wanted if k in ("time", "examples_per_s") or "cost" in k}
        for key in wanted.keys() - timed:
            assert got[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-5), key


def use_a_group(rank, port):
    distributed.init(rank, 2, rank, f"127.0.0.1:{port}", "cpu")
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])  # imports much
    distributed.shutdown()
    threads = [Path(name).read_text() for name in glob("/proc/self/task/*/comm")]
    assert not any("gloo" in name for name in threads), threads


def test_a_group_takes_its_threads_along():
    """Those that are left can bring a process down as Python ends."""
    spawn(use_a_group, (free_port(),), nprocs=2)


def test_one_process_needs_no_group():
    dist = distributed.init(0, 1, 0, "", "cpu")
    assert dist == Dist(0, 1, CPU) and dist.is_main
    assert not torch.distributed.is_initialized()
    x = torch.tensor([2.0], requires_grad=True)
    assert distributed.all_reduce("sum", x, dist).item() == 2.0
    assert [distributed.any_rank(f, dist) for f in (True, False)] == [True, False]


def test_asking_for_a_gpu_that_is_not_there_is_an_error():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="device=cuda"):
        distributed.init(0, 1, 0, "", "cuda")
