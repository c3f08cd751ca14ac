import numpy as np
import pytest
import torch

from spd_core.evaluate import evaluate, make_batch
from spd_core.randomness import StepRandomness


def batches(config, model):
    for i in range(config.eval.steps):
        randomness = StepRandomness(
            config.seed, i, 0, 1, config.eval.batch_size, torch.device("cpu")
        )
        yield make_batch(config, model, randomness, "eval")


def test_metrics_are_means_over_all_examples(make_config, tms_model, one_process, tmp_path):
    config = make_config("+losses.ci_masked_recon.coeff=1.0", "eval.metrics.ci_l0.threshold=0.3")
    model = tms_model()
    got = evaluate(config, model, 3, "fast", one_process, tmp_path / "figures")
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
            h = h if c.bias is None else h + c.bias.numpy()
        errors.append((np.maximum(h, 0) - b.target_out.numpy()) ** 2)
    assert got["eval/loss/ci_masked_recon"] == pytest.approx(np.mean(errors), rel=1e-4)


def test_every_evaluation_sees_the_same_numbers(make_config, tms_model, one_process, tmp_path):
    config, model = make_config(), tms_model()
    first, second = (evaluate(config, model, s, "fast", one_process, tmp_path) for s in (1, 4))
    assert first == second and all(np.isfinite(v) for v in first.values())


def test_evaluation_leaves_gradients_and_modes_alone(make_config, tms_model, one_process, tmp_path):
    """no_grad and never inference_mode: an adversarial loss switches gradients on inside."""
    model, seen = tms_model(), set()
    model.target.register_forward_hook(
        lambda *_: seen.add((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
    )
    evaluate(make_config(), model, 3, "slow", one_process, tmp_path)
    assert seen == {(False, False)} and torch.is_grad_enabled()
    assert all(p.grad is None for p in model.trained_parameters().values())


def test_fast_and_slow(make_config, tms_model, one_process, tmp_path):
    config = make_config("eval.metrics.mmcs_ml2r.when=slow", "eval.metrics.losses=null")
    fast, slow = (
        evaluate(config, tms_model(), 3, when, one_process, tmp_path) for when in ("fast", "slow")
    )
    new = set(slow) - set(fast)
    assert set(fast) < set(slow) and all("mmcs" in k or "ml2r" in k for k in new)
    assert not any("loss" in key for key in slow)


def test_figures_are_drawn_at_slow_evaluations_only(make_config, tms_model, one_process, tmp_path):
    config = make_config("eval.metrics.ci_histograms.when=slow", figures=True)
    folder = tmp_path / "figures"
    evaluate(config, tms_model(), 3, "fast", one_process, folder)
    assert not folder.exists()
    evaluate(config, tms_model(), 6, "slow", one_process, folder)
    names = {f.stem for f in folder.iterdir()}
    assert names == {"permuted_ci", "uv", "ci_histograms", "component_activation_density",
                     "ci_mean_per_component"}  # fmt: skip
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in folder.iterdir())
