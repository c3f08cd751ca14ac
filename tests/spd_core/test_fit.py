import pytest
import torch

from spd_core.targets.fit import CHECK_EVERY, fit


def target(make_config, *overrides):
    lr = "target.lr={kind:linear,start:0.1,end:0.0,warmup_fraction:0.0}"
    return make_config(lr, "target.weight_decay=0", *overrides).target


def test_it_finds_the_minimum_and_returns_the_mean_of_the_last_losses(make_config):
    x = torch.nn.Parameter(torch.tensor([3.0]))
    seen = []

    def loss_at(_step):
        loss = (x - 1).square().sum()
        seen.append(loss.item())
        return loss

    loss = fit(target(make_config, "target.steps=300"), [x], loss_at)
    assert x.item() == pytest.approx(1.0, abs=1e-2) and len(seen) == 300
    assert loss == pytest.approx(sum(seen[-100:]) / 100, abs=1e-6)


def test_the_first_step_moves_by_the_learning_rate(make_config):
    x = torch.nn.Parameter(torch.tensor([3.0]))
    fit(target(make_config, "target.steps=1"), [x], lambda _: x.sum())
    assert x.item() == pytest.approx(2.9, abs=1e-4)


def test_it_ends_when_solved(make_config):
    x = torch.nn.Parameter(torch.tensor([3.0]))
    steps = []

    def loss_at(step):
        steps.append(step)
        return x.square().sum()

    fit(target(make_config, "target.steps=2000"), [x], loss_at, solved=lambda: len(steps) > 600)
    assert len(steps) == 2 * CHECK_EVERY
