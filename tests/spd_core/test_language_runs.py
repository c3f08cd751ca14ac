"""Whole runs on a small GPT of its own, every module decomposed, its position embeddings too."""

import pytest
import torch
from safetensors.torch import load_file
from test_keep import text_run
from test_step import ON
from test_transformer import make_target_config

from spd_core.config import RunConfig
from spd_core.run_dir import read_metrics
from spd_core.train import train

CE = {"when": 1, "rounding_threshold": 0.5}
ATTENTION = {"include": ["*attn*"], "exclude": []}
OF_LANGUAGE = {
    "ce_and_kl": CE,
    "stochastic_recon_subset_ce_and_kl": {"when": 1, "subsets": {"attention": ATTENTION}},
}
GPT = {"kind": "gpt2_simple", "n_kv_heads": 4, "d_model": 16, "n_heads": 4, "d_mlp": 20}
OFF = ("identity_ci_error", "mmcs_ml2r", "permuted_ci_plots")


@pytest.fixture
def run(make_config, make_run_dir, one_process):
    """Metrics and trained weights of three steps with every loss."""

    def run_(name, *overrides, metrics=None, figures=False, **decompose):
        sizes = ("train.steps=3", "train.batch_size=6", "eval.batch_size=5", "eval.every=1")
        off = [f"eval.metrics.{metric}=null" for metric in OFF]
        base = make_config(*ON, *sizes, *off, "decompose.tied=[]", *overrides, figures=figures)
        target = make_target_config(**GPT, steps=20, n_layers=1)
        values = text_run(lambda: base, target, n_documents=60, seq_len=8).model_dump(mode="json")
        values["decompose"] |= {"modules": {"*": 4}, **decompose}
        values["eval"]["metrics"] |= metrics or {}
        run_dir = make_run_dir(name)
        train(RunConfig.model_validate(values), run_dir, one_process, lambda _step, _values: False)
        return read_metrics(run_dir), load_file(run_dir.checkpoints / "step_3/state.safetensors")

    return run_


@pytest.mark.parametrize("metric", OF_LANGUAGE)
def test_metrics_of_language_models_never_change_the_weights(metric, run):
    _, without = run("without")
    records, weights = run("with", metrics={metric: OF_LANGUAGE[metric]})
    assert all(any(key.startswith(f"eval/{metric}/kl/") for key in record) for record in records)
    assert all("tokens_per_s" in record for record in records)
    assert without.keys() == weights.keys()
    assert all(torch.equal(without[name], weights[name]) for name in without)


@pytest.mark.slow
def test_figures_of_language_models_never_change_the_weights(run):
    _, without = run("without")
    _, weights = run("with", figures=True)
    assert without.keys() == weights.keys()
    assert all(torch.equal(without[name], weights[name]) for name in without)


@pytest.mark.parametrize("metric, options", [
    ("permuted_ci_plots", {}),
    ("identity_ci_error", {"tolerance": 0.1, "modules": {"lm_head": {"kind": "dense", "k": 2}}}),
])  # fmt: skip
def test_what_needs_features_is_refused(metric, options, run):
    with pytest.raises(ValueError, match=rf"data\.kind=text does not fit eval\.metrics\.{metric}"):
        run("features", metrics={metric: {"when": 3, **options}})


@pytest.mark.parametrize("sampling", ["continuous", "binomial"])
def test_microbatches_change_nothing_in_a_language_model(sampling, run):
    """Position embeddings run once for all examples, at as many positions as one of them has."""
    whole, _ = run("whole", sampling=sampling)
    for size in (1, 2):
        parts, _ = run(f"parts of {size}", f"train.microbatch_size={size}", sampling=sampling)
        for key, value in whole[0].items():
            if key.startswith(("loss/", "ci_l0", "grad_norm", "eval/")):
                assert parts[0][key] == pytest.approx(value, rel=1e-4), key
