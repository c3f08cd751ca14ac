import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from spd_core.checkpoint import checkpoint_steps, newest_valid_checkpoint
from spd_core.config.metrics import MetricsConfig
from spd_core.data.batches import Decomposition, make_batch
from spd_core.losses.distance import faithfulness
from spd_core.randomness import StepRandomness
from spd_core.run_dir import read_metrics, write_atomic
from spd_core.step import accumulate_gradients, optimisation_step, scheduled
from spd_core.train import build_model, build_optimizer, faithfulness_warm_up, train

VOLATILE = ("time", "examples_per_s", "eval_cost/", "checkpoint_cost_s")


def never(_step, _values):
    return False


def stop_after(n_steps):
    """After so many more steps, wherever the run starts."""
    asked = iter(range(1, 1000))
    return lambda _step, _values: next(asked) >= n_steps


def crash_after(n_steps):
    def ask(step, _values):
        if step >= n_steps:
            raise KeyboardInterrupt
        return False

    return ask


@pytest.fixture
def start(make_run_dir, one_process):
    """Train in a folder of this name, once per call; the same name continues."""
    folders = {}

    def run(name, config, after_step=never):
        run_dir = folders[name] = folders[name] if name in folders else make_run_dir(name)
        return run_dir, train(config, run_dir, one_process, after_step)

    run.folders = folders
    return run


def metrics(run_dir):
    return [
        {k: v for k, v in r.items() if not k.startswith(VOLATILE)} for r in read_metrics(run_dir)
    ]


def weights(run_dir):
    folder, step, _ = newest_valid_checkpoint(run_dir)
    return step, load_file(folder / "state.safetensors")


def assert_same_run(run_dir, other):
    assert metrics(run_dir) == metrics(other)
    assert_same_weights(run_dir, other)


def assert_same_weights(run_dir, other):
    """Of model and optimiser; what metrics gather while training may differ."""
    (step, tensors), (other_step, other_tensors) = weights(run_dir), weights(other)
    trained = {k for k in tensors if not k.startswith("extra:")}
    assert step == other_step and trained == {k for k in other_tensors if k[:6] != "extra:"}
    assert trained and all(torch.equal(tensors[k], other_tensors[k]) for k in trained)


def test_a_run_from_start_to_end(start, make_config):
    run_dir, outcome = start("whole", make_config())
    assert outcome == "finished"
    assert checkpoint_steps(run_dir) == [4, 6]
    records = metrics(run_dir)
    assert [r["step"] for r in records if "loss/total" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "eval/mmcs/linear1" in r] == [3, 6]


def test_a_line_of_metrics_holds_all_of_its_step(start, make_config):
    schedule = "{kind:linear,start:1.0,end:0.5,warmup_fraction:0.0}"
    config = make_config(f"losses.stochastic_recon.coeff={schedule}", "track.log_every=2")
    records = read_metrics(start("a", config)[0])
    assert [r["step"] for r in records] == [1, 2, 3, 4, 6]  # the third for its evaluation
    losses = {f"loss/{name}" for name in ("total", *config.losses.configured())}
    threshold = config.eval.metrics.ci_l0.threshold
    of_step = losses | {f"ci_l0_{threshold}/{name}" for name in ("linear1", "linear2")}
    of_step |= {f"grad_norm_before_clip/{group}" for group in ("components", "ci_fns")}
    of_step |= {"schedule/lr", "schedule/coeff/stochastic_recon"}
    of_step |= {"schedule/p/importance_minimality", "examples_per_s", "checkpoint_cost_s"}
    for record in records:
        evaluated = {key for key in record if key.startswith("eval")}
        expected = set() if record["step"] == 3 else of_step
        assert record.keys() - evaluated == expected | {"step", "time"}
        assert bool(evaluated) == (record["step"] in (3, 6))
    assert {"eval_cost/seconds/total", "eval_cost/steps/total"} <= records[-1].keys()


def test_the_total_is_the_weighted_sum_and_lr_follows_the_schedule(start, make_config):
    lr = "{kind:linear,start:1e-2,end:2e-3,warmup_fraction:0.0}"
    run_dir, _ = start("a", make_config("losses.stochastic_recon.coeff=0.25", f"train.lr={lr}"))
    for i, r in enumerate(r for r in metrics(run_dir) if "loss/total" in r):
        parts = {"importance_minimality": 3e-3, "stochastic_recon": 0.25,
                 "stochastic_recon_layerwise": 1.0}  # fmt: skip
        total = sum(coeff * r[f"loss/{name}"] for name, coeff in parts.items())
        assert r["loss/total"] == pytest.approx(total, rel=1e-5)
        assert r["schedule/lr"] == pytest.approx(1e-2 - 8e-3 * i / 5)


@pytest.mark.parametrize("n_steps", [1, 2, 3, 5])
@pytest.mark.parametrize("sampling", ["continuous", "binomial"])
def test_a_stopped_and_continued_run_is_identical(n_steps, sampling, start, make_config):
    config = make_config(f"decompose.sampling={sampling}")
    whole, _ = start("whole", config)
    run_dir, outcome = start("stopped", config, stop_after(n_steps))
    assert outcome == "stopped" and checkpoint_steps(run_dir)[-1] == n_steps
    _, outcome = start("stopped", config)
    assert outcome == "finished"
    assert_same_run(whole, run_dir)


def test_a_run_that_is_stopped_again_and_again_is_identical(start, make_config):
    whole, _ = start("whole", make_config())
    outcomes = [start("stopped", make_config(), stop_after(1))[1] for _ in range(6)]
    assert outcomes == ["stopped"] * 5 + ["finished"]
    assert_same_run(whole, start.folders["stopped"])


@pytest.mark.parametrize("n_steps", [1, 3, 4, 5])
def test_a_crash_between_checkpoints_changes_nothing(n_steps, start, make_config):
    whole, _ = start("whole", make_config())
    with pytest.raises(KeyboardInterrupt):
        start("crashed", make_config(), crash_after(n_steps))
    run_dir, outcome = start("crashed", make_config())
    assert outcome == "finished"
    assert_same_run(whole, run_dir)


def test_a_damaged_newest_checkpoint_costs_steps_but_changes_nothing(start, make_config):
    whole, _ = start("whole", make_config())
    run_dir, _ = start("damaged", make_config(), stop_after(5))
    write_atomic(run_dir.checkpoints / "step_5" / "state.safetensors", "broken")
    start("damaged", make_config())
    assert_same_run(whole, run_dir)


def test_where_every_checkpoint_is_damaged_a_run_starts_anew(start, make_config):
    whole, _ = start("whole", make_config())
    run_dir, _ = start("damaged", make_config(), stop_after(5))
    for folder in run_dir.checkpoints.iterdir():
        write_atomic(folder / "meta.json", "5")
    start("damaged", make_config())
    assert_same_run(whole, run_dir)
    damaged = [f.name for f in run_dir.checkpoints.glob("damaged_*")]
    assert sorted(damaged) == ["damaged_step_4", "damaged_step_5"]


def test_a_checkpoint_that_cannot_be_written_ends_the_run(start, make_config, monkeypatch):
    whole, _ = start("whole", make_config())
    full = OSError("no space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr("spd_core.checkpoint.save_file", lambda *_: (_ for _ in ()).throw(full))
        start("full", make_config())
    run_dir = start.folders["full"]
    assert checkpoint_steps(run_dir) == [] and metrics(run_dir)[-1]["step"] < 6
    start("full", make_config())
    assert_same_run(whole, run_dir)


def test_the_ambient_random_state_changes_nothing(start, make_config):
    first, _ = start("first", make_config())
    torch.manual_seed(99)
    second, _ = start("second", make_config())
    assert_same_run(first, second)
    other, _ = start("other", make_config("seed=1"))
    assert metrics(other) != metrics(first)


OFF = ("losses", "ci_l0", "identity_ci_error", "mmcs_ml2r")
PGD = "init:random,step_size:0.2,n_steps:2"
ANNEAL = "p_anneal_start_frac:1.0,p_anneal_end_frac:1.0,p_anneal_final_p:1.0"
SUBSET = "routing:{kind:uniform_k_subset}"
MEASURED = {
    "alive_components": "threshold:0.1,n_examples:64",
    "pgd_multibatch_recon": f"{PGD},n_batches:2,{SUBSET}",
    "importance_minimality": f"p:0.5,beta:0.5,{ANNEAL}",
    "faithfulness": "",
    "unmasked_recon": "",
    "ci_masked_recon": "",
    "ci_masked_recon_subset": SUBSET,
    "ci_masked_recon_layerwise": "",
    "stochastic_recon": "",
    "stochastic_recon_subset": SUBSET,
    "stochastic_recon_layerwise": "",
    "pgd_recon": f"{PGD},scope:shared_across_batch",
    "pgd_recon_subset": f"{PGD},scope:unique_per_datapoint,{SUBSET}",
    "pgd_recon_layerwise": f"{PGD},scope:unique_per_datapoint",
    "stochastic_hidden_acts_recon": "",
}
FIGURES = ("ci_histograms", "component_activation_density", "ci_mean_per_component",
           "permuted_ci_plots", "uv_plots")  # fmt: skip
OF_LANGUAGE = {"ce_and_kl", "stochastic_recon_subset_ce_and_kl"}
ON = [
    f"+eval.metrics.{name}={{{options},when:1}}".replace("{,", "{")
    for name, options in MEASURED.items()
]
TOGGLES = [[f"eval.metrics.{name}=null"] for name in OFF] + [ON, ["eval.every=1"], ["eval.steps=1"]]
ONE_BY_ONE = [pytest.param([override], marks=pytest.mark.slow) for override in ON]


def test_every_metric_is_toggled():
    assert {*OFF, *MEASURED, *FIGURES, *OF_LANGUAGE} == {*MetricsConfig.model_fields}


@pytest.mark.parametrize("overrides", TOGGLES + ONE_BY_ONE)
def test_evaluation_never_changes_the_weights(overrides, start, make_config):
    first, _ = start("first", make_config())
    second, _ = start("second", make_config(*overrides))
    assert_same_weights(first, second)
    assert len(metrics(first)) != len(metrics(second)) or metrics(first) != metrics(second)


def test_figures_never_change_the_weights(start, make_config, monkeypatch):
    drawn = []

    def note(_figure, path, **_options):
        path.touch()
        drawn.append(path)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", note)
    first, _ = start("first", make_config())
    second, _ = start("second", make_config("eval.slow_every=3", figures=True))
    assert_same_weights(first, second)
    assert sorted(path.name.split(".")[1] for path in drawn) == sorted(FIGURES * 2)
    kept = [path.stem for path in second.figures.rglob("*") if path.is_file()]
    assert sorted(kept) == sorted(FIGURES * 2)


def test_what_is_alive_survives_a_stop(start, make_config):
    config = make_config(
        "+eval.metrics.alive_components={when:1,threshold:0.1,n_examples:1000}", "seed=2"
    )
    whole, _ = start("whole", config)
    stopped, _ = start("stopped", config, stop_after(4))
    start("stopped", config)
    assert_same_run(whole, stopped)
    ago = {n: weights(stopped)[1][f"extra:{n}"] for n in ("linear1", "linear2")}
    # Some were last important before the stop, which was 2 steps of 32 examples ago.
    assert any(((steps >= 64) & (steps < 1000)).any() for steps in ago.values())
    for name, steps in ago.items():
        counts = [r[key] for r in metrics(whole) if (key := f"eval/alive_components/{name}") in r]
        assert len(counts) == 6 and counts[-1] == (steps < 1000).sum()


def test_a_metric_that_is_switched_on_later_starts_anew(start, make_config):
    start("later", make_config(), stop_after(3))
    override = "+eval.metrics.alive_components={when:1,threshold:0.1,n_examples:96}"
    run_dir, outcome = start("later", make_config(override))
    assert outcome == "finished" and "eval/alive_components/linear1" in metrics(run_dir)[-1]


DIVERGE = "train.lr={kind:constant,start:1e30,end:1e30,warmup_fraction:0.0}"


def test_a_loss_that_is_not_finite_raises(start, make_config):
    with pytest.raises(
        FloatingPointError, match=r"step \d+: loss/.* nan.*grad_norm.*last checkpoint"
    ):
        start("nan", make_config(DIVERGE))
    losses = [r["loss/total"] for r in metrics(start.folders["nan"]) if "loss/total" in r]
    assert losses and all(abs(value) < float("inf") for value in losses)


def test_no_checkpoint_holds_weights_that_are_not_finite(start, make_config):
    with pytest.raises(FloatingPointError):
        start("nan", make_config(DIVERGE, "track.log_every=5", "eval.metrics.losses=null"))
    for step in checkpoint_steps(start.folders["nan"]):
        state = load_file(start.folders["nan"].checkpoints / f"step_{step}" / "state.safetensors")
        assert all(t.isfinite().all() for name, t in state.items() if name.startswith("model:"))


STRIDE = 4
BAD = """
def loss(model, batch, *, draws: list[int]):
    here = batch.randomness.phase == "train" and batch.randomness.step in draws
    return batch.target_out.sum() * (float("nan") if here else 0.0), 1
"""


@pytest.fixture
def bad_draws(make_config, tmp_path, monkeypatch):
    """A config of 6 steps, saved every 2, that meets a NaN in the batches of these numbers."""
    (tmp_path / "bad_draws.py").write_text(BAD)
    monkeypatch.syspath_prepend(tmp_path)

    def make(*draws, on_nan="rewind"):
        loss = f"+losses.bad={{path: bad_draws.loss, coeff: 1.0, draws: {list(draws)}}}"
        return make_config(loss, f"train.on_nan={on_nan}")

    return make


def crash_after_so_many(n_steps):
    """Steps, with those that come again."""
    asked = iter(range(1, 1000))

    def ask(_step, _values):
        if next(asked) == n_steps:
            raise KeyboardInterrupt
        return False

    return ask


def rewinds(run_dir):
    """How often the run went back to step 0, 2, 4 and 6."""
    return json.loads(run_dir.rewinds_file.read_text())


def test_after_a_rewind_other_batches_are_drawn_until_the_next_checkpoint(start, bad_draws):
    clean, _ = start("clean", bad_draws())
    run_dir, outcome = start("rewound", bad_draws(2, 8))
    assert outcome == "finished" and rewinds(run_dir) == [0, 2, 0, 0]
    losses = [
        [r["loss/total"] for r in metrics(folder) if "loss/total" in r]
        for folder in (clean, run_dir)
    ]
    assert [len(values) for values in losses] == [6, 6]
    assert losses[0][:2] == losses[1][:2]
    assert all(a != b for a, b in zip(losses[0][2:], losses[1][2:], strict=True))
    assert checkpoint_steps(run_dir) == [4, 6] and not clean.rewinds_file.exists()


def test_without_a_checkpoint_a_rewind_goes_to_the_beginning(start, bad_draws):
    run_dir, outcome = start("rewound", bad_draws(1))
    assert outcome == "finished" and rewinds(run_dir) == [1, 0, 0, 0]
    # That of draws 6 and 7 from the same weights.
    first = next(r["loss/total"] for r in metrics(run_dir) if r["step"] == 1)
    clean, _ = start("clean", bad_draws())
    assert first != next(r["loss/total"] for r in metrics(clean) if r["step"] == 1)


@pytest.mark.parametrize("n_steps", range(1, 8))
@pytest.mark.parametrize("end", ["stop", "crash"])
def test_a_rewound_run_that_ends_anywhere_is_identical(end, n_steps, start, bad_draws):
    config = bad_draws(3, 5, 11)
    whole, _ = start("whole", config)
    if end == "stop":
        start("ended", config, stop_after(n_steps))
    else:
        with pytest.raises(KeyboardInterrupt):
            start("ended", config, crash_after_so_many(n_steps))
    run_dir, outcome = start("ended", config)
    assert outcome == "finished" and rewinds(run_dir) == rewinds(whole) == [0, 1, 2, 0]
    assert_same_run(whole, run_dir)
    assert checkpoint_steps(run_dir) == checkpoint_steps(whole)


def test_a_rewound_run_that_is_stopped_after_every_step_is_identical(start, bad_draws):
    config = bad_draws(3, 5, 11)
    whole, _ = start("whole", config)
    outcomes = []
    while "finished" not in outcomes:
        outcomes.append(start("stopped", config, stop_after(1))[1])
    assert_same_run(whole, start.folders["stopped"])


def test_a_kill_before_a_rewind_is_noted_changes_nothing(start, bad_draws):
    config = bad_draws(3)
    whole, _ = start("whole", config)
    run_dir, _ = start("killed", config, stop_after(4))  # the third comes twice
    assert rewinds(run_dir) == [0, 1, 0, 0]
    run_dir.rewinds_file.unlink()
    shutil.rmtree(run_dir.checkpoints / "step_3")
    start("killed", config)
    assert_same_run(whole, run_dir)


def kill_before_write(number, folder):
    """SIGKILL this process as it is about to write, rename or remove for the so manieth time."""
    seen, names = itertools.count(1), ("os.mkdir", "os.rename", "os.remove", "os.rmdir")

    def hook(event, given):
        writes = event == "open" and str(given[0]).startswith(str(folder)) and given[2] & os.O_CREAT
        if (writes or event in names) and next(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, STRIDE + 1))
def test_a_kill_before_any_write_changes_nothing(first, start, bad_draws, make_run_dir):
    """Of metrics, checkpoints and rewinds; and the process that continues is killed as well."""
    config = bad_draws(3, 5, 11)
    whole, _ = start("whole", config)
    for number in itertools.count(first, STRIDE):
        name, killed = f"before write {number}", []
        start.folders[name] = make_run_dir(name)
        for its_number in (number, 7):
            child = os.fork()
            if child == 0:
                kill_before_write(its_number, whole.path.parent)
                start(name, config)
                os._exit(0)
            killed.append(os.WIFSIGNALED(os.waitpid(child, 0)[1]))
        run_dir, outcome = start(name, config)
        assert outcome == "finished" and rewinds(run_dir) == rewinds(whole), number
        assert_same_run(whole, run_dir)
        assert checkpoint_steps(run_dir) == checkpoint_steps(whole), number
        if not killed[0]:
            assert number > 30
            break


def test_a_damaged_checkpoint_of_a_rewind_changes_nothing(start, bad_draws):
    config = bad_draws(5)
    whole, _ = start("whole", config)
    with pytest.raises(KeyboardInterrupt):
        start("damaged", config, crash_after_so_many(6))  # the fifth comes twice
    run_dir = start.folders["damaged"]
    assert rewinds(run_dir) == [0, 0, 1, 0]
    write_atomic(run_dir.checkpoints / "step_4" / "state.safetensors", "broken")
    start("damaged", config)
    assert_same_run(whole, run_dir)


def test_where_rewinds_do_not_help_the_run_ends_as_without_them(start, bad_draws, monkeypatch):
    slow_disk, words = os.rename, {}
    monkeypatch.setattr(os, "rename", lambda *paths: time.sleep(0.7) or slow_disk(*paths))
    for on_nan in ("stop", "rewind"):
        with pytest.raises(FloatingPointError) as error:
            start(on_nan, bad_draws(*range(3, 100, 6), on_nan=on_nan))
        words[on_nan] = str(error.value)
    beginnings = {text.split(":")[0] for text in words.values()}
    assert beginnings == {"not finite at step 4"}
    assert all("loss/bad nan" in text and "checkpoints: [2]" in text for text in words.values())
    assert rewinds(start.folders["rewind"]) == [0, 3, 0, 0]
    assert [r["step"] for r in metrics(start.folders["rewind"]) if "loss/total" in r] == [1, 2, 3]
    with pytest.raises(FloatingPointError, match="step 4"):  # and does so again
        start("rewind", bad_draws(*range(3, 100, 6)))
    assert not start.folders["stop"].rewinds_file.exists()


def test_after_each_step_all_ranks_are_told_how_many_are_done(start, make_config):
    told = []
    config = make_config("track.log_every=2")

    def tell(step, values):
        told.append((step, "loss/total" in values, "eval/mmcs/linear1" in values))
        return len(told) == 4

    start("told", config, tell)
    start("told", config, tell)
    assert [step for step, *_ in told] == [1, 2, 3, 4, 5, 6]
    assert [step for step, losses, _ in told if losses] == [1, 2, 4, 6]
    assert [step for step, _, metrics in told if metrics] == [3, 6]


def test_a_wrong_module_is_an_error(start, make_config):
    with pytest.raises(ValueError, match="linear7"):
        start("wrong", make_config("+decompose.modules.linear7=3"))


def test_a_wrong_module_of_a_metric_is_an_error_before_training(start, make_config):
    with pytest.raises(ValueError, match="linear7"):
        modules = "+eval.metrics.identity_ci_error.modules"
        start("wrong", make_config(f"{modules}.linear7={{kind:dense,k:1}}"))
    assert read_metrics(start.folders["wrong"]) == []


def test_a_wrong_size_of_the_known_solution_is_a_users_error(start, make_config):
    override = "eval.metrics.identity_ci_error.modules.linear1.n=4"
    with pytest.raises(ValueError, match=r"error\.modules\.linear1\.n=4 of 5 features"):
        start("wrong", make_config(override, "eval.metrics.identity_ci_error.when=slow"))
    assert read_metrics(start.folders["wrong"]) == []


@pytest.fixture
def one_step(make_config, make_run_dir, one_process):
    """Gradients and weights around one optimisation step."""
    targets = make_run_dir("step").targets

    def step(*overrides):
        config = make_config(*overrides)
        model = build_model(config, targets, one_process, Console(quiet=True))
        before = {n: p.detach().clone() for n, p in model.trained_parameters().items()}
        optimizer = build_optimizer(config, model)
        result = optimisation_step(
            Decomposition(config, model, one_process, None), optimizer, 0, 0, lambda _batch: {}
        )
        return model, before, result

    return step


def test_gradients_are_clipped_apart(one_step):
    model, _, result = one_step()
    free = result.grad_norms
    limit = free["components"].item() / 3
    model, _, result = one_step(f"train.grad_clip.components={limit}")
    norm = {
        "components": torch.cat([p.grad.flatten() for p in model.component_parameters()]).norm(),
        "ci_fns": torch.cat([p.grad.flatten() for p in model.ci_fn_parameters()]).norm(),
    }
    torch.testing.assert_close(result.grad_norms["components"], free["components"])
    scale = limit / (free["components"].item() + 1e-6)  # PyTorch's own guard against zero
    assert norm["components"].item() == pytest.approx(scale * free["components"].item(), rel=1e-3)
    torch.testing.assert_close(norm["ci_fns"], free["ci_fns"])


def test_the_first_adamw_step_in_closed_form(one_step):
    """The first step of AdamW moves by lr g / (|g| + eps), after shrinking by lr * decay."""
    lr = "train.lr={kind:constant,start:1e-2,end:1e-2,warmup_fraction:0.0}"
    model, before, _ = one_step(lr, "train.weight_decay=0.5")
    for name, p in model.trained_parameters().items():
        wanted = before[name] * (1 - 1e-2 * 0.5) - 1e-2 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), wanted, atol=1e-5, rtol=1e-4)


def test_gradients_against_finite_differences(make_config, tms_model, one_process):
    config = make_config("decompose.sigmoid=normal", "losses.importance_minimality.beta=0.3")
    model = tms_model("decompose.sigmoid=normal").double()
    d = Decomposition(config, model, one_process, None)

    def loss():
        randomness = StepRandomness(0, 0, 0, 1, 32, torch.device("cpu"))
        batch = make_batch(d, randomness, "train")
        model.zero_grad()
        losses, _, _ = accumulate_gradients(
            d, lambda: [batch], 1, scheduled(config, 0), lambda _batch: {}
        )
        coeffs = scheduled(config, 0).coeffs
        return sum(coeffs[name] * value.item() for name, value in losses.items())

    # The data are float32, so the model is asked in double only where the streams allow it.
    torch.set_default_dtype(torch.float64)
    try:
        loss()
        gradients = {n: c.U.grad.clone() for n, c in model.components.items()}
        for name in ("linear1", "linear2"):
            U = model.components[name].U
            U.data[1, 0] += 1e-5
            up = loss()
            U.data[1, 0] -= 2e-5
            down = loss()
            U.data[1, 0] += 1e-5
            assert gradients[name][1, 0].item() == pytest.approx(
                (up - down) / 2e-5, rel=1e-4, abs=1e-8
            )
    finally:
        torch.set_default_dtype(torch.float32)


def test_warm_up_fits_the_components_and_nothing_else(one_step, make_config):
    model, _, _ = one_step()
    before = faithfulness(model.components)[0].item()
    ci_fns = [p.detach().clone() for p in model.ci_fn_parameters()]
    warmup = "train.faithfulness_warmup={steps:100,lr:3e-2,weight_decay:0.0}"
    faithfulness_warm_up(make_config(warmup), model)
    assert faithfulness(model.components)[0].item() < before / 10
    assert all(torch.equal(a, b) for a, b in zip(ci_fns, model.ci_fn_parameters(), strict=True))


@pytest.mark.slow
def test_the_loop_works_without_wandb(make_config, make_run_dir):
    run_dir, config = make_run_dir("run"), make_config()
    program = f"""
import sys, torch
from pathlib import Path
sys.modules["wandb"] = None  # whoever imports it gets an ImportError
from spd_core.config import RunConfig
from spd_core.distributed import Dist
from spd_core.run_dir import RunDir
from spd_core.train import train
config = RunConfig.model_validate_json({config.model_dump_json()!r})
run_dir = RunDir(Path({str(run_dir.path)!r}))
dist = Dist(rank=0, world_size=1, device=torch.device("cpu"))
assert train(config, run_dir, dist, lambda *_: False) == "finished"
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
    assert read_metrics(run_dir)
