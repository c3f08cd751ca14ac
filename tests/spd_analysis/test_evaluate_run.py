import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from spd_analysis.evaluate_run import evaluate_run, main, print_tables, read_evaluations
from spd_core.config import load_config
from spd_core.run_dir import read_metrics
from spd_launch.config import config_to_yaml

REPO = Path(__file__).parents[2]
ALIVE = "+eval.metrics.alive_components={when:slow,threshold:0.1,n_examples:100}"
PGD = (
    "+eval.metrics.pgd_recon={when:slow,init:random,step_size:0.1,n_steps:2,"
    "scope:shared_across_batch}"
)
KEEP_ALL = "checkpoint.keep=10"


@pytest.fixture
def command(monkeypatch, capsys):
    """The command in this process: its exit code, and what it prints."""

    def run(*arguments):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        monkeypatch.setattr(sys, "argv", ["evaluate_run", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


def run_command(*arguments):
    command = [sys.executable, "-m", "spd_analysis.evaluate_run", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=REPO)


def last_evaluation(run_dir):
    """What training itself wrote at its last step, costs aside."""
    last = [r for r in read_metrics(run_dir) if any(k.startswith("eval/") for k in r)][-1]
    return {k: v for k, v in last.items() if k.startswith("eval/")}


def metrics(evaluation, step):
    return {k: v for k, v in evaluation.checkpoints[step].items() if k.startswith("eval/")}


def test_at_the_last_step_it_is_what_training_measured(trained, one_process):
    run_dir = trained("run", ALIVE, PGD, "eval.metrics.permuted_ci_plots={when:slow}")
    evaluation = evaluate_run(run_dir, [6], None, None, "full", one_process)
    assert metrics(evaluation, 6) == last_evaluation(run_dir)
    assert any(k.startswith("eval/alive_components/") for k in last_evaluation(run_dir))
    (picture,) = (run_dir.path / "evals" / "full" / "step_6").iterdir()
    assert picture.read_bytes() == (run_dir.figures / "step_6" / picture.name).read_bytes()
    assert read_evaluations(run_dir) == {"full": evaluation}


def test_earlier_checkpoints_and_all_metrics_at_each(trained, one_process):
    run_dir = trained("run", KEEP_ALL, "eval.metrics.permuted_ci_plots={when:slow}")
    every = evaluate_run(run_dir, [2, 4, 6], None, None, "all", one_process)
    assert len({v["eval/loss/stochastic_recon"] for v in every.checkpoints.values()}) == 3
    assert every.checkpoints[2].keys() == every.checkpoints[6].keys()
    figures = run_dir.path / "evals" / "all"
    assert sorted(f.name for f in figures.iterdir()) == ["step_2", "step_4", "step_6"]
    evaluate_run(run_dir, [4], None, None, "all", one_process)
    assert [f.name for f in figures.iterdir()] == ["step_4"]  # the pictures are those of the file
    assert read_evaluations(run_dir)["all"].checkpoints.keys() == {4}


def test_more_data_holds_the_old_data_and_moves_the_mean(trained, one_process, make_config):
    run_dir = trained("run")
    means = {}
    for n in (1, 2):
        values = evaluate_run(run_dir, [6], 16, n, f"n{n}", one_process).checkpoints[6]
        means[n] = values["eval/ci_l0_0.1/linear1"]
    record = json.loads((run_dir.path / "evals" / "n2.json").read_text())
    assert (record["batch_size"], record["steps"], record["processes"]) == (16, 2, 1)
    # Of 16 and of 32 examples the mean number of active subcomponents is a multiple of these.
    assert means[1] * 16 == round(means[1] * 16) and means[2] * 32 == round(means[2] * 32)
    second = means[2] * 32 - means[1] * 16
    assert 0 <= second <= 16 * make_config().decompose.modules["linear1"]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(trained):
    run_dir = trained("run", ALIVE, PGD)
    for n in (1, 2):
        done = run_command(run_dir.path, "--processes", n, "--name", f"p{n}", "--batch-size", 30)
        assert done.returncode == 0, done.stderr
    one, two = (read_evaluations(run_dir)[f"p{n}"] for n in (1, 2))
    assert (one.processes, two.processes) == (1, 2)
    assert metrics(two, 6) == pytest.approx(metrics(one, 6), rel=1e-5, abs=1e-7)
    assert f"wrote {run_dir.path}/evals/p2.json" in done.stdout
    assert done.stdout.count("spd_analysis.report") == 1  # one process speaks for both


def test_the_table_holds_every_run_and_checkpoint(trained, one_process, capsys):
    runs = [trained(name, f"seed={seed}", KEEP_ALL) for seed, name in enumerate(["a_run", "b_run"])]
    evaluations = [evaluate_run(r, [4, 6], None, None, "full", one_process) for r in runs]
    print_tables(evaluations, Console(width=200))
    printed = capsys.readouterr().out
    table = printed[printed.index("ci_l0_0.1") : printed.index("identity_ci_error")]
    for evaluation in evaluations:
        for step in (4, 6):
            (row,) = [x for x in table.splitlines() if x.split()[:2] == [evaluation.run, str(step)]]
            wanted = [evaluation.checkpoints[step][f"eval/ci_l0_0.1/linear{i}"] for i in (1, 2)]
            assert [float(cell) for cell in row.split()[2:]] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("step, problem", [
    (5, r"no checkpoint of step 5, only of 4, 6"), (4, r"step_4 is damaged"),
])  # fmt: skip
def test_a_checkpoint_that_is_not_there_or_damaged(step, problem, trained, one_process):
    run_dir = trained("run")
    file = run_dir.checkpoints / "step_4" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    with pytest.raises(ValueError, match=problem):
        evaluate_run(run_dir, [step], None, None, "full", one_process)
    assert not (run_dir.path / "evals" / "full.json").exists()


def test_a_run_without_a_checkpoint_ends_with_a_message(trained, command):
    run_dir = trained("run")
    shutil.rmtree(run_dir.checkpoints)
    code, _, err = command(run_dir.path, "--processes", 2)
    assert code == 2 and err.startswith(f"error: no checkpoint in {run_dir.path} (not launched)")
    assert "resume" in err and err.count("\n") == 1


def test_a_target_that_cannot_be_had_is_named(trained, one_process):
    run_dir = trained("run")
    config = load_config(run_dir.config_file)
    target = config.target.model_copy(update={"n_hidden": 3})
    run_dir.config_file.write_text(config_to_yaml(config.model_copy(update={"target": target})))
    with pytest.raises(ValueError, match=r"no target at .*moved, or never trained"):
        evaluate_run(run_dir, [6], None, None, "full", one_process)


@pytest.mark.parametrize("arguments, problem", [
    (["--name", "../x"], "letters, digits"), (["--steps", 0], "no number from 1"),
    (["--step", 6, "--all-steps"], "not allowed with"), (["--step", 7], "no checkpoint of step 7"),
])  # fmt: skip
def test_what_was_asked_wrongly_is_said(arguments, problem, trained, command):
    code, _, err = command(trained("run").path, *arguments)
    assert code == 2 and problem in err


def test_more_processes_than_examples(trained, one_process):
    run_dir, two = trained("run"), dataclasses.replace(one_process, world_size=2)
    with pytest.raises(ValueError, match="--batch-size 1 leaves some of 2 processes empty"):
        evaluate_run(run_dir, [6], 1, None, "full", two)


@pytest.mark.slow
def test_a_tracked_run_has_it_in_wandb_too(trained, monkeypatch):
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    run_dir = trained("run", "track.wandb.mode=offline")
    done = run_command(run_dir.path)
    assert done.returncode == 0, done.stderr
    (file,) = (run_dir.path / "wandb").glob("offline-run-*/run-run.wandb")
    content = file.read_bytes()
    for metric in ("identity_ci_error/linear1", "loss/stochastic_recon", "step"):
        assert f"evals/full/{metric}".encode() in content
    shutil.rmtree(run_dir.path / "wandb")
    assert run_command(run_dir.path, "--wandb", "off").returncode == 0
    assert not (run_dir.path / "wandb").exists()
