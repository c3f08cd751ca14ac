import numpy as np
import pytest
import torch

from spd_core.data.induction import induction_sequences
from spd_core.randomness import StepRandomness, stream
from spd_core.targets.induction import InductionTransformer, induction_problem, train_induction
from spd_launch.compose import compose
from spd_launch.validate import validate

CPU = torch.device("cpu")


@pytest.fixture
def config():
    arguments = ["+experiment=ih", "cluster=local", "data.vocab_size=10", "data.seq_len=12",
                 "target.batch_size=64", "target.steps=3", "target.n_heads=2"]  # fmt: skip
    return validate(compose(arguments, multirun=False)[0].values)


def draw(config, n=2000, part=0, n_parts=1):
    randomness = StepRandomness(0, 0, part, n_parts, n, CPU)
    return induction_sequences(config.data, randomness.batch_stream("x"))


def test_what_followed_the_cue_follows_it_again(config):
    tokens = draw(config)
    assert tokens.shape == (2000, 13)
    for row in tokens.tolist():
        cues = [i for i, token in enumerate(row) if token == 10]
        assert len(cues) == 2 and cues[1] == 11
        assert row[cues[0] + 1] == row[12] and max(set(row) - {10}) < 10


def test_the_first_cue_stands_everywhere_that_leaves_room(config):
    first = (draw(config) == 10).float().argmax(1)
    assert sorted(set(first.tolist())) == list(range(10))


def test_ranks_share_one_batch(config):
    parts = [draw(config, 30, part, 4) for part in range(4)]
    assert torch.equal(torch.cat(parts), draw(config, 30))


def test_forward_against_numpy(config):
    model = InductionTransformer(config.target, config.data, stream(0, "test", device=CPU))
    tokens = draw(config, 3)[:, :-1]
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = weights["wte.weight"][tokens.numpy()] + weights["wpe.weight"]
    for block in range(2):
        q, k, v = (linear(f"blocks.{block}.attn.{p}_proj", x) for p in "qkv")
        mixed = np.zeros_like(x)
        for h in range(2):
            part = slice(8 * h, 8 * h + 8)
            scores = q[..., part] @ k[..., part].swapaxes(1, 2) / 8**0.5
            scores[:, np.triu(np.ones((12, 12), bool), 1)] = -np.inf
            attention = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[..., part] = attention / attention.sum(-1, keepdims=True) @ v[..., part]
        x = x + linear(f"blocks.{block}.attn.out_proj", mixed)
    wanted = x[:, -1] @ weights["lm_head.weight"].T
    np.testing.assert_allclose(model(tokens).detach(), wanted, atol=1e-4)


def test_a_model_that_cannot_do_it_is_a_bad_target(config):
    model, loss = train_induction(config.target, config.data, 0)
    assert np.isfinite(loss) and "less than 0.99" in induction_problem(
        model, config.target, config.data
    )


def test_one_that_can_is_not(config):
    class Perfect(torch.nn.Module):
        def forward(self, tokens):
            place = (tokens == 10).float().argmax(1) + 1
            return torch.nn.functional.one_hot(tokens[torch.arange(len(tokens)), place], 11)

    assert induction_problem(Perfect(), config.target, config.data) is None
