import re

import pytest
from rich.console import Console

from spd_analysis.summary import (
    final_metrics,
    format_value,
    metric_tables,
    print_summary,
    short_names,
)
from spd_core.run_dir import append_metrics
from spd_core.targets.train_target import load_or_train_target
from spd_launch.config import config_to_yaml


@pytest.fixture
def run_dir(make_run_dir, make_config):
    run_dir = make_run_dir("a_run")
    run_dir.config_file.write_text(config_to_yaml(make_config()))
    append_metrics(run_dir, {"step": 0, "loss/total": 2.0, "lr": 0.1})
    return run_dir


def test_without_an_evaluation_the_error_says_so(run_dir):
    for function in (final_metrics, metric_tables, print_summary):
        with pytest.raises(ValueError, match="no evaluation"):
            function(run_dir)


def test_the_last_value_of_every_metric_counts(run_dir):
    append_metrics(run_dir, {"step": 1, "eval/mmcs/linear1": 0.2, "eval/loss/x": 3.0})
    append_metrics(run_dir, {"step": 2, "eval/mmcs/linear1": 0.9, "eval/mmcs/linear2": 0.5})
    append_metrics(run_dir, {"step": 2, "eval/pgd_recon": 0.5, "eval/ce_and_kl/kl/unmasked": 0.25})
    assert metric_tables(run_dir) == {
        "module": {"linear1": {"mmcs": 0.9}, "linear2": {"mmcs": 0.5}},
        "loss": {"x": {"value": 3.0}, "pgd_recon": {"value": 0.5}},
        "ce_and_kl": {"unmasked": {"kl": 0.25}},
    }
    assert final_metrics(run_dir)["loss/total"] == 2.0


@pytest.mark.parametrize("metric, value, text", [
    ("identity_ci_error", 3.0, "3"), ("mmcs", 0.123456, "0.1235"), ("ci_l0_0.1", 2.0, "2"),
    ("value", 0.00123456, "1.235e-03"),
])  # fmt: skip
def test_format(metric, value, text):
    assert format_value(metric, value) == text


@pytest.mark.parametrize("wrong, verdict", [(0.0, "was found"), (2.0, "was not found")])
def test_the_summary_names_the_run_and_the_verdict(wrong, verdict, run_dir, capsys):
    append_metrics(
        run_dir, {"step": 6, "eval/identity_ci_error/linear1": wrong, "eval/loss/x": 3.0}
    )
    print_summary(run_dir)
    printed = capsys.readouterr().out
    assert verdict in printed and "a_run" in printed and "report.html" in printed


def test_the_summary_names_the_target_with_its_seed_and_loss(run_dir, make_config, capsys):
    append_metrics(run_dir, {"step": 6, "eval/loss/x": 3.0})
    config = make_config("target.seed=2", "target.n_seeds=1")
    run_dir.config_file.write_text(config_to_yaml(config))
    load_or_train_target(config, run_dir.targets, Console(quiet=True))
    print_summary(run_dir)
    assert re.search(
        r"target +tms of seed 2, mean squared error \d\.\d\de-0\d", capsys.readouterr().out
    )


@pytest.mark.parametrize("run_ids, short", [
    (["tms_5-2-seed0-88ce", "tms_5-2-seed1-88ce"], ["seed0", "seed1"]),
    (["tms_5-2-seed0-88ce", "tms_5-2-seed1-363d"], ["seed0-88ce", "seed1-363d"]),
    (["a-b", "a-b-c"], ["b", "b-c"]), (["alone-1"], ["1"]), (["a", "b"], ["a", "b"]),
])  # fmt: skip
def test_short_names_keep_what_differs(run_ids, short):
    assert short_names(run_ids) == short
