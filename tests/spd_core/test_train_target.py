import io
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from test_keep import text_run

from spd_core.randomness import stream
from spd_core.targets.store import read_record, target_folder
from spd_core.targets.tms import TMS, tms_problem, train_tms
from spd_core.targets.train_target import load_or_train_target, train_target

QUIET = Console(quiet=True)


def test_the_second_call_loads_the_same_weights(make_config, tmp_path):
    config = make_config()
    target = load_or_train_target(config, tmp_path, QUIET)
    first, seed = target.module, target.seed
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.safetensors")}
    again = load_or_train_target(config, tmp_path, QUIET)
    second, same_seed = again.module, again.seed
    assert len(files) == 1 and all(f.stat().st_mtime_ns == t for f, t in files.items())
    assert seed == same_seed
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    assert tms_problem(first) is None
    assert torch.equal(first.linear2.weight, first.linear1.weight.T)


def test_another_target_or_other_data_is_another_entry(make_config, tmp_path):
    for override in ("seed=5", "target.steps=151", "data.feature_probability=0.06"):
        load_or_train_target(make_config(override), tmp_path, QUIET)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_who_comes_second_waits_until_the_first_has_ended_or_it_is_stopped(
    make_config, one_process, tmp_path
):
    config, console = make_config(), Console(file=io.StringIO(), width=200)
    lock = tmp_path / f"{target_folder(config, tmp_path).name}.lock"
    hold = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)"
    until = "print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", f"{hold}; {until}", str(lock)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as first:
        assert first.stdout is not None and first.stdin is not None and first.stdout.readline()
        asked = []

        def after_step(step):
            asked.append(step)
            return len(asked) == 2

        arguments = (config, tmp_path, one_process, console)
        assert train_target(*arguments, after_step) == "stopped" and asked == [0, 0]
        assert "another process is training this target" in console.file.getvalue()
        assert read_record(config, tmp_path) is None
        first.stdin.close()
    assert train_target(*arguments, lambda _: False) == "finished"
    assert read_record(config, tmp_path) is not None


def test_a_target_without_every_feature_is_rejected(make_config, tmp_path):
    config = make_config("target.steps=1", "target.n_seeds=2")
    with pytest.raises(ValueError, match=r"n_seeds|steps"):
        load_or_train_target(config, tmp_path, QUIET)
    assert list(tmp_path.rglob("*.safetensors")) == []


def tms(make_config, diagonal):
    model = TMS(make_config("target.n_hidden=5").target, stream(0, "t", device=torch.device("cpu")))
    model.linear1.weight.data = torch.diag(torch.tensor(diagonal) ** 0.5)
    model.copy_tied_weight()
    return model


def test_missing_features(make_config):
    assert "[2, 3]" in tms_problem(tms(make_config, [1.0, 0.6, 0.4, 0.0, 1.0]))


def test_a_target_that_became_nan_misses_every_feature(make_config):
    assert "[0, 1, 2, 3, 4]" in tms_problem(tms(make_config, [float("nan")] * 5))


def test_training_lowers_the_loss_and_keeps_weights_tied(make_config):
    config = make_config()
    _, early = train_tms(make_config("target.steps=2").target, config.data, 0)
    model, late = train_tms(config.target, config.data, 0)
    assert late < early / 2
    assert torch.equal(model.linear2.weight, model.linear1.weight.T)


def custom(make_config, class_path, pretrained=None, output=None):
    from spd_core.targets.config import CustomTargetConfig

    target = CustomTargetConfig(
        kind="custom", class_path=class_path, pretrained=pretrained, n_features=None, output=output
    )
    return make_config().model_copy(update={"target": target})


def test_a_custom_target_is_any_importable_module(make_config, tmp_path, monkeypatch):
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n"
        "    def __init__(self):\n        super().__init__(nn.Linear(3, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    target = load_or_train_target(custom(make_config, "my_net.Net"), tmp_path, QUIET)
    assert target.module(torch.zeros(1, 3)).shape == (1, 2) and target.seed is None


def test_a_pretrained_model_of_transformers_from_a_folder(make_config, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 6}
    made = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    made.save_pretrained(tmp_path / "gpt2")
    config = custom(
        make_config, "transformers.GPT2LMHeadModel", str(tmp_path / "gpt2"), output="logits"
    )
    target = load_or_train_target(config, tmp_path, QUIET)
    tokens = torch.randint(11, (2, 6))
    torch.testing.assert_close(target.module.eval()(tokens).logits, made(tokens).logits)
    assert target.output == "logits" and target.module.config.use_cache is False


@pytest.mark.parametrize("class_path, pretrained, message", [
    ("no_such_package.Net", None, "No module named 'no_such_package'; it is found in .*PYTHONPATH"),
    ("torch.nn.NoSuchModule", None, "has no attribute 'NoSuchModule'; it is found in "),
    ("transformers.GPT2LMHeadModel", "no/such/folder/at/all", "pretrained=no.*HF_HUB_OFFLINE"),
    ("torch.nn.Linear", None, "missing 2 required positional arguments"),
    ("torch.nn.Linear", "x", "pretrained=x: .*no attribute 'from_pretrained'"),
    ("pathlib.Path", None, r"makes no torch\.nn\.Module"),
])  # fmt: skip
def test_a_custom_target_that_is_not_there_is_named(
    class_path, pretrained, message, make_config, tmp_path
):
    with pytest.raises(ValueError, match=rf"^target\.class_path={class_path}.*{message}") as error:
        load_or_train_target(custom(make_config, class_path, pretrained), tmp_path, QUIET)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("class_path", ["transformers.GPT2LMHeadModel", "my_lm.Net"])
def test_more_tokens_than_a_custom_target_embeds_are_refused(
    class_path, make_config, tmp_path, monkeypatch
):
    from transformers import GPT2Config, GPT2LMHeadModel

    (tmp_path / "my_lm.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Embedding(299, 8), nn.Linear(8, 299))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    # The positions are as many as the tokens: what counts is the table of tokens.
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 299, "n_positions": 300}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    name = str(tmp_path / "gpt2") if class_path.startswith("transformers") else None
    target = custom(make_config, class_path, name).target
    config = text_run(make_config, target)
    with pytest.raises(ValueError, match=r"data\.tokenizer=None has 300 tokens .*embeds 299"):
        load_or_train_target(config, tmp_path / "targets", QUIET)
    fewer = text_run(make_config, target, vocab_size=299)
    assert load_or_train_target(fewer, tmp_path / "targets", QUIET).seed is None
