import io
import json
import math
import multiprocessing
import re
import socket

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_model
from test_keep import text_run
from test_transformer import KINDS, make_target_config, seeded

from spd_core import distributed
from spd_core.data.text import load_or_tokenise
from spd_core.schedule import schedule_value
from spd_core.targets.pretrain import (
    Stopped,
    main,
    make_optimizer,
    pretrain,
    training_step,
    trigram_loss,
    validation_loss,
)
from spd_core.targets.train_target import target_folder
from spd_core.targets.transformer import build
from spd_launch.config import config_to_yaml

VOCAB, SEQ = 8, 24
QUIET = Console(quiet=True)


def rows_with_a_favourite(n, seed):
    """Each row has a token that fills 60 % of it: the whole past tells more than two tokens do."""
    generator = seeded(seed)
    favourite = torch.randint(0, VOCAB, (n, 1), generator=generator)
    others = torch.randint(0, VOCAB, (n, SEQ), generator=generator)
    return torch.where(torch.rand(n, SEQ, generator=generator) < 0.6, favourite, others)


def train(config, dist, folder=None, console=QUIET, batches=None, stop_at=None, **options):
    """Every rank's part of a global batch that depends on the step alone."""

    def part(tokens):
        return tokens.tensor_split(dist.world_size)[dist.rank]

    def batch(step):
        return part(rows_with_a_favourite(config.batch_size, 1000 + step))

    eval_batches = [part(rows_with_a_favourite(n, n)) for n in (65, 60)]
    given = (config, batches or batch, eval_batches, VOCAB, SEQ, dist, folder, console)
    return pretrain(*given, lambda done: done == stop_at, **options)


def weights_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama_simple", "gpt2_simple"])
def test_pretraining_beats_a_trigram_model(kind, one_process):
    lr = {"kind": "cosine", "start": 1e-2, "end": 1e-3, "warmup_fraction": 0.1}
    config = make_target_config(kind=kind, n_layers=1, steps=250, batch_size=32, lr=lr)
    model, loss = train(config, one_process)
    rows = rows_with_a_favourite(20_000, 1).numpy()
    trigram = trigram_loss(rows, rows_with_a_favourite(2_000, 2).numpy(), VOCAB)
    known_favourite = -0.65 * math.log(0.65) - 7 * 0.05 * math.log(0.05)
    assert known_favourite < loss < trigram - 0.1 < math.log(VOCAB) - 0.2
    fresh = [rows_with_a_favourite(500, 3)]
    assert validation_loss(model, fresh, one_process) == pytest.approx(loss, abs=0.1)


def test_a_killed_run_continues_to_the_same_weights(one_process, tmp_path):
    config = make_target_config()
    wanted, wanted_loss = train(config, one_process, report_every=3)

    def killed_at_7(step):
        if step == 7:
            raise KeyboardInterrupt
        return rows_with_a_favourite(config.batch_size, 1000 + step)

    with pytest.raises(KeyboardInterrupt):
        train(config, one_process, tmp_path, batches=killed_at_7, report_every=3)
    console = Console(file=io.StringIO(), width=200)
    model, loss = train(config, one_process, tmp_path, console, report_every=3)
    assert "continuing the target from step 6" in console.file.getvalue()
    assert loss == wanted_loss
    for name, weight in weights_of(wanted).items():
        assert torch.equal(weights_of(model)[name], weight), name
    assert [path.name for path in tmp_path.iterdir()] == ["pretrain.safetensors"]
    # What is finished is only evaluated.
    assert train(config, one_process, tmp_path, batches=lambda _: pytest.fail("trains"))[1] == loss


def test_what_is_stopped_saves_at_that_step_and_continues_to_the_same_weights(
    one_process, tmp_path
):
    config = make_target_config()
    wanted, wanted_loss = train(config, one_process)
    with pytest.raises(Stopped):
        train(config, one_process, tmp_path, stop_at=7)
    seen = []

    def batches(step):
        seen.append(step)
        return rows_with_a_favourite(config.batch_size, 1000 + step)

    # At the last step there is nothing to stop.
    model, loss = train(config, one_process, tmp_path, batches=batches, stop_at=10)
    assert seen == [7, 8, 9] and loss == wanted_loss
    for name, weight in weights_of(wanted).items():
        assert torch.equal(weights_of(model)[name], weight), name


def test_a_checkpoint_of_another_config_is_refused(one_process, tmp_path):
    train(make_target_config(steps=1), one_process, tmp_path)
    with pytest.raises(ValueError, match=r"pretrain\.safetensors.*another target config"):
        train(make_target_config(steps=2), one_process, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_training(one_process, tmp_path):
    lr = {"kind": "constant", "start": 1e30, "end": 1e30, "warmup_fraction": 0.0}
    with pytest.raises(FloatingPointError, match=r"step 10.*target\.lr"):
        train(make_target_config(lr=lr), one_process, tmp_path)
    assert not list(tmp_path.iterdir())


def test_reports(one_process):
    console = Console(file=io.StringIO(), width=200)
    options = {"decode": lambda ids: f"<{len(ids)} tokens>", "report_every": 4}
    train(make_target_config(), one_process, None, console, **options)
    lines = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines[::2]] == ["4/10", "8/10", "10/10"]
    pattern = r"step \d+/10  loss [12]\.\d{3}  validation [12]\.\d{3}  [\d,]+ tokens/s"
    assert all(re.fullmatch(pattern, line) for line in lines[::2])
    assert [line.strip() for line in lines[1::2]] == [f"<{SEQ} tokens>"] * 3


def test_one_step(one_process):
    lr = {"kind": "linear", "start": 1e-2, "end": 0.0, "warmup_fraction": 0.4}
    config = make_target_config(kind="gpt2_simple", lr=lr, grad_clip=0.01)
    model = build(config, VOCAB, SEQ, seeded())
    optimizer, tokens = make_optimizer(config, model), rows_with_a_favourite(8, 0)
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    loss_sum = training_step(config, model, optimizer, tokens, 0, one_process)
    assert loss_sum.item() == pytest.approx(8 * 23 * math.log(VOCAB), rel=0.1)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, before[name])  # the warm-up starts at 0
    training_step(config, model, optimizer, tokens, 6, one_process)
    assert {g["lr"] for g in optimizer.param_groups} == {schedule_value(config.lr, 6, 10)}
    decays = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert all(decays[p] == (0.1 if p.dim() == 2 else 0.0) for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_near_full_precision(kind, one_process):
    losses = []
    for autocast in ("off", "bf16"):
        config = make_target_config(kind=kind, autocast=autocast)
        model = build(config, VOCAB, SEQ, seeded())
        step = (config, model, make_optimizer(config, model), rows_with_a_favourite(8, 0))
        losses.append(training_step(*step, 0, one_process).item())
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_validation_loss(one_process):
    model = build(make_target_config(), VOCAB, SEQ, seeded())
    batches = [rows_with_a_favourite(n, n) for n in (3, 5)]
    nats = [
        -model(row[None])[0].log_softmax(-1)[i, row[i + 1]].item()
        for row in torch.cat(batches)
        for i in range(SEQ - 1)
    ]
    assert validation_loss(model, batches, one_process) == pytest.approx(np.mean(nats), rel=1e-5)


def rank_main(rank, world, port, config, queue):
    torch.set_num_threads(1)
    dist = distributed.init(rank, world, rank, f"127.0.0.1:{port}", "cpu")
    model, loss = train(config, dist)
    distributed.shutdown()
    queue.put(({name: weight.tolist() for name, weight in weights_of(model).items()}, loss))


def test_two_processes_train_what_one_trains(one_process):
    config = make_target_config()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "spd_core.train"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    queue = context.Queue()
    ranks = [context.Process(target=rank_main, args=(r, 2, port, config, queue)) for r in (0, 1)]
    for process in ranks:
        process.start()
    try:
        answers = [queue.get(timeout=60) for _ in ranks]
    finally:
        for process in ranks:
            process.join(timeout=10)
            process.kill()
    wanted, wanted_loss = train(config, one_process)
    assert answers[0] == answers[1]
    weights, loss = answers[0]
    assert loss == pytest.approx(wanted_loss, abs=1e-5)
    for name, weight in weights_of(wanted).items():
        torch.testing.assert_close(torch.tensor(weights[name]), weight, atol=1e-5, rtol=1e-5)


@pytest.fixture
def text_config(make_config):
    return text_run(make_config, make_target_config(steps=40))


def test_the_program_fills_the_target_store(text_config, tmp_path, capsys):
    config_file = tmp_path / "runs" / "one" / "config.yaml"
    config_file.parent.mkdir(parents=True)
    config_file.write_text(config_to_yaml(text_config))
    main(config_file)
    printed = " ".join(capsys.readouterr().out.split())
    folder = target_folder(text_config, tmp_path / "targets")
    record = json.loads((folder / "target.json").read_text())
    assert record["seed"] == 0 and f"validation loss {record['loss']:.3f} nats" in printed
    assert record["loss"] < math.log(300) - 0.5
    vocab_size = load_or_tokenise(text_config.data, tmp_path / "data", QUIET).vocab_size
    model = build(text_config.target, vocab_size, 32, seeded())
    load_model(model, folder / "target.safetensors")
    assert [path.name for path in (tmp_path / "targets").iterdir() if path.is_dir()] == [
        folder.name
    ]
    main(config_file)
    assert "step" not in capsys.readouterr().out


def test_the_program_refuses_toy_targets(make_config, tmp_path):
    (tmp_path / "config.yaml").write_text(config_to_yaml(make_config()))
    with pytest.raises(SystemExit, match=r"target\.kind=tms"):
        main(tmp_path / "config.yaml")


def test_trigram_loss_by_hand():
    train_tokens = np.array([[0, 1, 0, 1, 1]])
    # p(w) = (c + 2/3) / 7, so 8/21, 11/21, 2/21 for the tokens 0, 1, 2; then
    # p(1|0) = (2 + p(1)) / 3, p(0|1) = (1 + 2 p(0)) / 4, p(0|01) = (1 + 2 p(0|1)) / 4,
    # p(2|0) = p(2) / 3, and p(2|10) = p(2|0) / 2; nothing is known to follow 2.
    by_hand = {
        (0, 1, 0): (53 / 63, 79 / 168),
        (1, 0, 2): (37 / 84, 1 / 63),
        (2, 2, 1): (2 / 21, 11 / 21),
    }
    for row, probabilities in by_hand.items():
        wanted = -np.log(probabilities).mean()
        assert trigram_loss(train_tokens, np.array([row]), 3) == pytest.approx(wanted)
    wanted = -np.log([*by_hand.values()]).mean()
    assert trigram_loss(train_tokens, np.array([*by_hand]), 3) == pytest.approx(wanted)


def test_a_trigram_model_is_a_distribution_and_finds_trigrams():
    rows = np.random.default_rng(0).integers(0, 5, (30, 9))
    for history in ([0, 1], [4, 4]):
        probabilities = []
        for w in range(5):
            two, three = np.array([history]), np.array([[*history, w]])
            nats = 2 * trigram_loss(rows, three, 5) - trigram_loss(rows, two, 5)
            probabilities.append(math.exp(-nats))
        assert sum(probabilities) == pytest.approx(1)
    periodic = np.tile([0, 0, 1, 0, 2], (4, 40))
    assert trigram_loss(periodic, periodic[:, 100:], 3) < 0.05
