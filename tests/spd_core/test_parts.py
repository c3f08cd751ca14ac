"""Parts of the user's own: those of docs/extending.md as they stand there, and mistakes."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from spd_core.config import RunConfig
from spd_core.data.batches import Decomposition, training_batches
from spd_core.parts import load_part
from spd_core.run_dir import read_metrics
from spd_core.train import build_model, faithfulness_warm_up, train
from spd_launch.compose import compose
from spd_launch.errors import LaunchError
from spd_launch.validate import validate

REPO = Path(__file__).parents[2]
PAGE = (REPO / "docs" / "extending.md").read_text()
(COMMAND,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
(MISTAKES,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
SMALL = ["cluster=local", "target.steps=150", "target.batch_size=256", 
         "target.lr={kind:constant,start:3e-2,end:3e-2,warmup_fraction:0}",
         "train.steps=4", "train.batch_size=64", "train.device=cpu", "eval.every=2",
         "eval.slow_every=4", "eval.steps=2", "eval.batch_size=32", "track.log_every=1",
         "checkpoint.every_steps=2"]  # fmt: skip
FIGURES = ("ci_histograms", "component_activation_density", "ci_mean_per_component",
           "permuted_ci_plots", "uv_plots")  # fmt: skip
NO_FIGURES = [f"eval.metrics.{name}=null" for name in FIGURES]

MISTAKEN = """
import torch
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from nowhere import Batch

NUMBER = 3

def named_otherwise(net, batch): ...
def unannotated(model, batch, *, power=1.0): ...
def read_late(model, batch: "Batch", *, power: float): ...
def strict(model, batch, *, model_size: int, names: list[str]): ...
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The modules of the page, in a folder that is searched."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "my_parts").mkdir()
    for code in re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL):
        (folder / code[0]).write_text(code[1])
    (folder / "my_parts" / "mistaken.py").write_text(MISTAKEN)
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


def typed():
    """The overrides of the page's command line."""
    environment, *command = shlex.split(COMMAND)
    assert (environment, command[:3]) == ("PYTHONPATH=$PWD", ["python", "-m", "spd_launch"])
    return [word for word in command[3:] if word.strip()]


def config_of(*overrides) -> RunConfig:
    return validate(compose([*typed(), *SMALL, *NO_FIGURES, *overrides], multirun=False)[0].values)


@pytest.fixture
def trained(make_run_dir, one_process):
    def train_(*overrides, name="run"):
        run_dir, config = make_run_dir(name), config_of(*overrides)
        train(config, run_dir, one_process, lambda _step, _values: False)
        return config, run_dir, read_metrics(run_dir)

    return train_


def test_the_page_as_it_stands(trained, one_process):
    config, run_dir, records = trained("decompose.start=random")
    model = build_model(config, run_dir.targets, one_process, Console(quiet=True))
    assert {type(f).__name__ for f in model.ci_fns.values()} == {"Size"}
    assert model.ci_fns["linear1"].slope.mean().item() == pytest.approx(2, abs=0.2)
    faithfulness_warm_up(config, model)
    batches, _ = training_batches(Decomposition(config, model, one_process, None), 0)
    ci = np.concatenate(
        [c.lower.detach().numpy() for batch in batches() for c in batch.ci.values()], 1
    )
    wanted = ((4 * ci * (1 - ci)) ** 2).sum(1).mean()
    assert 0 < records[0]["loss/undecided"] == pytest.approx(wanted, rel=1e-5)
    last = records[-1]
    assert "eval/loss/undecided" in last and 0 <= last["eval/crowded/linear1"] <= 1
    assert last["eval_cost/seconds/lengths"] > 0
    assert [r["step"] for r in records if "eval/crowded/linear2" in r] == [2, 4]
    assert [f.name for f in run_dir.figures.iterdir()] == ["step_4"]
    assert [f.name for f in run_dir.figures.glob("step_4/*")] == ["lengths.png"]


def test_microbatches_change_nothing(trained):
    (_, _, whole), (_, _, parts) = trained(), trained("train.microbatch_size=16", name="micro")
    for one, other in zip(whole, parts, strict=True):
        for key in ("loss/undecided", "loss/total", "eval/crowded/linear1"):
            assert other.get(key) == (pytest.approx(one[key], rel=1e-4) if key in one else None)


def test_a_metric_or_figure_never_changes_the_weights(trained, folder):
    """Not even one that draws from the ambient random state."""
    (folder / "my_parts" / "noisy.py").write_text(
        "import torch\n\ndef noise(model, batch):\n    return {'x': (torch.rand(()), 1)}\n"
    )
    noisy = "eval.metrics.noisy={path: my_parts.noisy.noise, kind: metric, when: 1}"
    off = ("eval.metrics.crowded=null", "eval.metrics.lengths=null")
    (_, first, _), (_, second, records) = trained(*off, name="off"), trained(noisy, name="noisy")
    assert sum("eval/noisy/x" in record for record in records) == 4
    one, other = (
        load_file(run.checkpoints / "step_4" / "state.safetensors") for run in (first, second)
    )
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_stop_changes_nothing(trained, make_run_dir, one_process):
    config, _, whole = trained()
    run_dir = make_run_dir("stopped")
    for stop in (True, True, False):
        train(config, run_dir, one_process, lambda _step, _values, stop=stop: stop)
    for one, other in zip(whole, read_metrics(run_dir), strict=True):
        untimed = {k for k in one if k not in ("time", "examples_per_s") and "cost" not in k}
        assert {k: one[k] for k in untimed} == {k: other[k] for k in untimed}


def test_the_mistakes_of_the_page():
    """Each message is what the change of one word of the command prints."""
    changes = [("power: 2", "power: 0.5"), ("threshold: 0.1", "threshold: 0.1, atleast: 3"),
               ("ci_fn.Size", "ci_fn.Sise")]  # fmt: skip
    for (old, new), line in zip(changes, MISTAKES.splitlines(), strict=True):
        overrides = [word.replace(old, new) for word in typed()]
        assert overrides != typed()
        with pytest.raises(LaunchError) as error:
            validate(compose([*overrides, *SMALL], multirun=False)[0].values)
        assert f"error: {error.value}" == line


LOSS = "losses.mine={{path:{},coeff:1.0{}}}"


@pytest.mark.parametrize("override, message", [
    (LOSS.format("my_parts.mistaken.absent", ""), "losses.mine.path=my_parts.mistaken.absent: .*"),
    (LOSS.format("no_such_package.loss", ""), "no_such_package.*PYTHONPATH"),
    (LOSS.format("my_parts.mistaken.NUMBER", ""), "NUMBER is no function or class"),
    (LOSS.format("my_parts.mistaken.named_otherwise", ""), r"takes \(net, batch\); a loss takes"),
    (LOSS.format("my_parts.mistaken.unannotated", ""), "power has no annotation"),
    (LOSS.format("my_parts.mistaken.read_late", ",power:1"), "annotation .* name 'Batch' is not"),
    (LOSS.format("my_parts.mistaken.strict", ",names:[a]"), "losses.mine.model_size: Field requ"),
    (LOSS.format("my_parts.mistaken.strict", ",names:[a],model_size:2.5"), "mine.model_size: Inp"),
    (LOSS.format("my_parts.mistaken.strict", ",names:[a,[1]],model_size:2"), "losses.mine.names.1"),
    (LOSS.format("my_parts.ci_fn.Size", ",slope:1.0"), r"a loss takes \(model, batch\)"),
    ("eval.metrics.mine={path:my_parts.loss.undecided,kind:figure,when:2,power:x}", "mine.power"),
    ("decompose.ci_fn.path=my_parts.loss.undecided", r"a ci_fn takes \(C, d_in, generator\)"),
])  # fmt: skip
def test_mistakes_name_the_field(override, message):
    with pytest.raises(LaunchError, match=f"(?s){message}"):
        config_of(override)


def test_options_are_made_what_they_are_declared():
    config = config_of(LOSS.format("my_parts.mistaken.strict", ",names:[a,b],model_size:2.0"))
    options = load_part("losses.mine", config.losses.configured()["mine"], "loss").keywords
    assert options == {"model_size": 2, "names": ["a", "b"]}


def test_the_inherited_hidden_goes_to_a_class_that_declares_it(folder):
    code = (folder / "my_parts" / "ci_fn.py").read_text()
    deeper = code.replace("slope: float = 1.0", "slope: float = 1.0, hidden: list[int]")
    (folder / "my_parts" / "deeper.py").write_text(deeper)
    kept = [word for word in typed() if not word.startswith("~")]
    with pytest.raises(LaunchError, match=r"decompose\.ci_fn\.hidden: Extra"):
        validate(compose([*kept, *SMALL], multirun=False)[0].values)
    kept = [word.replace("my_parts.ci_fn", "my_parts.deeper") for word in kept]
    config = validate(compose([*kept, *SMALL], multirun=False)[0].values)
    assert config.decompose.ci_fn.model_extra == {"slope": 2.0, "hidden": [16]}


@pytest.mark.slow
def test_the_command_of_the_page(folder, tmp_path):
    """As a user types it, in the folder that holds my_parts/."""
    more = shlex.join([*SMALL, f"launch.out_dir={tmp_path}", "launch.snapshot=off"])
    line = f"{COMMAND.strip()} {more}".replace(
        "PYTHONPATH=$PWD", f"PYTHONPATH=$PWD:{shlex.quote(str(REPO))}"
    )
    line = line.replace(" python ", f" {shlex.quote(sys.executable)} ")
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "figures" / "step_4" / "lengths.png").exists() and "undecided" in done.stdout
