import time

import numpy as np
import pytest
import torch

from spd_core.data.batches import Decomposition, make_batch
from spd_core.evaluate import check_metrics, due_metrics, evaluate
from spd_core.randomness import StepRandomness


def evaluated(config, model, step, dist, folder):
    """Everything that is due after `step` steps, without what it cost."""
    got = evaluate(
        Decomposition(config, model, dist, None), step, due_metrics(config, step), None, 1.0, folder
    )
    return {key: value for key, value in got.items() if "cost" not in key}


def batches(config, model):
    for i in range(config.eval.steps):
        randomness = StepRandomness(
            config.seed, i, 0, 1, config.eval.batch_size, torch.device("cpu"), "eval"
        )
        yield make_batch(Decomposition(config, model, None, None), randomness, "eval")


def test_metrics_are_means_over_all_examples(make_config, tms_model, one_process, tmp_path):
    config = make_config("+losses.ci_masked_recon.coeff=1.0", "eval.metrics.ci_l0.threshold=0.3")
    model = tms_model()
    got = evaluated(config, model, 3, one_process, tmp_path / "figures")
    lower = np.concatenate([b.ci["linear1"].lower.detach() for b in batches(config, model)])
    assert len(lower) == 64
    l0 = [v for k, v in got.items() if "ci_l0" in k and "0.3" in k and k.endswith("linear1")]
    assert l0 == [pytest.approx((lower > 0.3).sum(1).mean())]
    errors = []
    for b in batches(config, model):
        h = b.examples.numpy()
        for name, c in model.components.items():
            V, U = c.V.detach().numpy(), c.U.detach().numpy()
            h = ((h @ V) * b.ci[name].lower.detach().numpy()) @ U
            h = h + model.target.linear2.bias.numpy() if name == "linear2" else h
        errors.append((np.maximum(h, 0) - b.target_out.numpy()) ** 2)
    assert got["eval/loss/ci_masked_recon"] == pytest.approx(np.mean(errors), rel=1e-4)


def test_every_evaluation_sees_the_same_numbers(make_config, tms_model, one_process, tmp_path):
    config, model = make_config(), tms_model()
    first, second = (evaluated(config, model, s, one_process, tmp_path) for s in (3, 9))
    assert first == second and all(np.isfinite(v) for v in first.values())


def test_evaluation_leaves_gradients_and_modes_alone(make_config, tms_model, one_process, tmp_path):
    """no_grad and never inference_mode: an adversarial loss switches gradients on inside."""
    model, seen = tms_model(), set()
    model.target.register_forward_hook(
        lambda *_: seen.add((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
    )
    evaluated(make_config(), model, 6, one_process, tmp_path)
    assert seen == {(False, False)} and torch.is_grad_enabled()
    assert all(p.grad is None for p in model.trained_parameters().values())


def test_fast_and_slow(make_config, tms_model, one_process, tmp_path):
    config = make_config("eval.metrics.mmcs_ml2r.when=slow", "eval.metrics.losses=null")
    fast, slow = (evaluated(config, tms_model(), s, one_process, tmp_path) for s in (3, 6))
    new = set(slow) - set(fast)
    assert set(fast) < set(slow) and all("mmcs" in k or "ml2r" in k for k in new)
    assert not any("loss" in key for key in slow)


def test_figures_are_drawn_at_slow_evaluations_only(make_config, tms_model, one_process, tmp_path):
    config = make_config("eval.metrics.ci_histograms.when=slow", figures=True)
    folder = tmp_path / "figures"
    evaluated(config, tms_model(), 3, one_process, folder)
    assert not folder.exists()
    evaluated(config, tms_model(), 6, one_process, folder)
    names = {f.stem for f in folder.iterdir()}
    assert names == {"permuted_ci_plots", "uv_plots", "ci_histograms", "ci_mean_per_component",
                     "component_activation_density"}  # fmt: skip
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in folder.iterdir())


@pytest.mark.parametrize("step, due", [
    (1, ""), (2, "two"), (3, "fast"), (4, "two"), (5, "five"), (6, "two fast slow"), (7, ""),
    (9, "fast"), (10, "two five"), (13, "two five fast slow"),
])  # fmt: skip
def test_every_metric_has_its_own_frequency(step, due, make_config):
    when = {"ci_l0": 2, "mmcs_ml2r": 5, "losses": "fast", "identity_ci_error": "slow"}
    overrides = [f"eval.metrics.{name}.when={value}" for name, value in when.items()]
    config = make_config(*overrides, "eval.every=3", "eval.slow_every=6", "train.steps=13")
    names = {"two": "ci_l0", "five": "mmcs_ml2r", "fast": "losses", "slow": "identity_ci_error"}
    assert set(due_metrics(config, step)) == {names[word] for word in due.split()}


def napping(model, batch, *, seconds: float):  # noqa: ARG001
    time.sleep(seconds)
    return {}


def test_the_cost_of_every_metric_is_measured(make_config, tms_model, one_process, tmp_path):
    nap = f"+eval.metrics.nap={{path:{__name__}.napping,kind:metric,when:fast,seconds:0.03}}"
    config = make_config(nap)
    due = due_metrics(config, 3)
    got = evaluate(
        Decomposition(config, tms_model(), one_process, None), 3, due, None, 0.25, tmp_path
    )
    seconds, steps = (
        {k.removeprefix(kind): v for k, v in got.items() if k.startswith(kind)}
        for kind in ("eval_cost/seconds/", "eval_cost/steps/")
    )
    assert set(seconds) == {*due, "batches", "total"}
    assert 0.06 <= seconds["nap"] < 0.5  # one nap for each of two batches
    total = seconds.pop("total")
    assert total == pytest.approx(sum(seconds.values()))
    for name, value in {**seconds, "total": total}.items():
        assert steps[name] == pytest.approx(value / 0.25) and value > 0


def plain_numbers(model, batch):  # noqa: ARG001
    x = batch.examples
    return {
        "tensors": (x.sum(), x.numel()),
        "floats": (float(x.sum()), float(x.numel())),
        "ints": ((x > 0).sum(), 2.5 * len(x)),
    }


def test_a_metric_of_ones_own_may_give_plain_numbers(make_config, tms_model, one_process, tmp_path):
    config = make_config(f"+eval.metrics.mine={{path:{__name__}.plain_numbers,kind:metric,when:3}}")
    got = evaluated(config, tms_model(), 3, one_process, tmp_path)
    x = np.concatenate([b.examples for b in batches(config, tms_model())])
    assert got["eval/mine/tensors"] == got["eval/mine/floats"] == pytest.approx(x.mean())
    assert got["eval/mine/ints"] == pytest.approx((x > 0).sum() / (2.5 * len(x)))


def test_a_loss_measured_with_options_of_its_own(make_config, tms_model, one_process, tmp_path):
    anneal = "p_anneal_start_frac:1.0,p_anneal_end_frac:1.0,p_anneal_final_p:1.0"
    config = make_config(
        f"+eval.metrics.importance_minimality={{when:fast,p:2.0,beta:0.0,{anneal}}}",
        "+eval.metrics.faithfulness={when:fast}",
    )
    model = tms_model()
    got = evaluated(config, model, 3, one_process, tmp_path)
    for p in (1, 2):
        upper = [
            np.concatenate([b.ci[n].upper.detach() for b in batches(config, model)])
            for n in model.components
        ]
        wanted = sum((u.astype(float) ** p).mean(0).sum() for u in upper)
        key = "eval/loss/importance_minimality" if p == 1 else "eval/importance_minimality"
        assert got[key] == pytest.approx(wanted, rel=1e-4)
    errors = [c.weight - (c.V @ c.U).T for c in model.components.values()]
    mean = torch.cat([e.detach().flatten() for e in errors]).square().mean().item()
    assert got["eval/faithfulness"] == pytest.approx(mean, rel=1e-5)


def worst_shared_masks(model, x, ci, target_out, step_size, n_steps):
    """PGD on sources that all examples share, from zero, with the TMS and its masks written out."""

    def error():
        h = x
        for name, c in model.components.items():
            r, W = sources[name], c.weight.T
            masked = ((h @ c.V) * (ci[name] + (1 - ci[name]) * r[:-1])) @ c.U
            h = masked + r[-1] * (h @ (W - c.V @ c.U))
        h = h + model.target.linear2.bias
        return (h.relu() - target_out).square().mean()

    sources = {n: torch.zeros(c.C + 1, requires_grad=True) for n, c in model.components.items()}
    for _ in range(n_steps):
        gradients = torch.autograd.grad(error(), list(sources.values()))
        sources = {
            name: (r + step_size * g.sign()).clamp(0, 1).detach().requires_grad_()
            for (name, r), g in zip(sources.items(), gradients, strict=True)
        }
    return error().item()


def test_pgd_in_an_evaluation(make_config, tms_model, one_process, tmp_path):
    options = "when:fast,init:zeroes,step_size:0.2,n_steps:7,scope:shared_across_batch"
    config, model = make_config(f"+eval.metrics.pgd_recon={{{options}}}"), tms_model()
    got = evaluated(config, model, 3, one_process, tmp_path)
    worst = [
        worst_shared_masks(model, b.examples, lower(b), b.target_out, 0.2, 7)
        for b in batches(config, model)
    ]
    assert got["eval/pgd_recon"] == pytest.approx(np.mean(worst), rel=1e-4)
    unmoved = [
        worst_shared_masks(model, b.examples, lower(b), b.target_out, 0.2, 0)
        for b in batches(config, model)
    ]
    assert np.mean(worst) > 1.01 * np.mean(unmoved)


def lower(batch):
    return {n: ci.lower.detach() for n, ci in batch.ci.items()}


def test_multibatch_pgd_is_pgd_on_one_big_batch(
    make_config, tms_model, one_process, tmp_path, monkeypatch
):
    options = "when:fast,init:zeroes,step_size:0.2,n_steps:7,routing:all,n_batches:3"
    config = make_config(f"+eval.metrics.pgd_multibatch_recon={{{options}}}")
    model, seen = tms_model(), []

    def spy(d, randomness, purpose):
        batch = make_batch(d, randomness, purpose)
        if purpose != "eval":
            seen.append(batch)
        return batch

    monkeypatch.setattr("spd_core.data.batches.make_batch", spy)
    got = evaluated(config, model, 3, one_process, tmp_path)
    # The same three batches at each of seven steps, and once more for the value.
    rounds = [torch.stack([b.examples for b in seen[-3 * i :][:3]]) for i in range(1, 9)]
    assert len(seen) >= 24 and all(torch.equal(r, rounds[0]) for r in rounds)
    assert not torch.equal(rounds[0][0], rounds[0][1])
    x, out = (torch.cat([getattr(b, k) for b in seen[-3:]]) for k in ("examples", "target_out"))
    ci = {n: torch.cat([lower(b)[n] for b in seen[-3:]]) for n in model.components}
    wanted = worst_shared_masks(model, x, ci, out, 0.2, 7)
    assert got["eval/pgd_multibatch_recon"] == pytest.approx(wanted, rel=1e-4)


def test_known_solutions_that_are_missed(
    make_config, tms_model, one_process, tmp_path, monkeypatch
):
    modules = "eval.metrics.identity_ci_error.modules"
    config = make_config(
        f"~{modules}.linear2", f"+{modules}.linear2={{kind:dense,k:2}}",
        "eval.metrics.identity_ci_error.tolerance=0.1",
    )  # fmt: skip
    ci = {"linear1": torch.eye(5, 6).flip(1), "linear2": torch.zeros(5, 6)}
    ci["linear1"][0, 0] = 0.15  # surplus
    ci["linear1"][4, 1] = 0.85  # too small
    ci["linear2"][2, :5] = torch.tensor([0.09, 0.11, 0.5, 1.0, 0.2])  # four columns, not two
    monkeypatch.setattr("spd_core.evaluate.single_feature_ci", lambda *_: ci)
    got = evaluated(config, tms_model(), 3, one_process, tmp_path)
    errors = {k: v for k, v in got.items() if "identity_ci_error" in k}
    assert errors == {"eval/identity_ci_error/linear1": 2, "eval/identity_ci_error/linear2": 2}


@pytest.mark.parametrize("override, message", [
    ("+eval.metrics.ci_l0.groups={linear1:['*']}", "groups.linear1: a name"),
    ("+eval.metrics.ci_l0.groups={attention:['*attn*']}", r"groups.attention: no module for"),
    ("+eval.metrics.mmcs_ml2r.modules.linear3=features_in", "'linear3', which is not decomposed"),
])  # fmt: skip
def test_a_metric_that_does_not_fit_is_refused(override, message, make_config, tms_model):
    with pytest.raises(ValueError, match=message):
        check_metrics(make_config(override), tms_model())


def test_figures_are_drawn_under_autocast(make_config, tms_model, one_process, tmp_path):
    config = make_config("train.autocast=bf16", figures=True)
    evaluated(config, tms_model(), 6, one_process, tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 5
