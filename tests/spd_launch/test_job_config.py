import pytest
import yaml
from launch_configs import config
from pydantic import ValidationError

from spd_core.config import RunConfig, load_config
from spd_launch.config import config_to_yaml, result_digest, run_config


def test_what_is_trained_is_the_same_wherever_it_runs(tmp_path):
    """And that is all that a run's config.yaml holds."""
    here, there = config("local", seed=3), config("cpu", seed=3, launch__max_requeues=7)
    assert here != there and run_config(here) == run_config(there)
    (tmp_path / "config.yaml").write_text(config_to_yaml(run_config(there)))
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert values["seed"] == 3 and not {"cluster", "launch"} & values.keys()
    assert type(load_config(tmp_path / "config.yaml")) is RunConfig
    assert load_config(tmp_path / "config.yaml") == run_config(here)


@pytest.mark.parametrize("section", ["cluster", "launch"])
def test_the_core_refuses_what_it_does_not_know_of(section):
    values = config("local").model_dump(mode="json")
    known = {key: value for key, value in values.items() if key not in ("cluster", "launch")}
    RunConfig.model_validate(known)
    with pytest.raises(ValidationError, match=section):
        RunConfig.model_validate(known | {section: values[section]})


@pytest.mark.parametrize("change, message", [
    ({"cluster__gpus_per_node": 0}, "gpus_per_node"),
    ({"cluster__requeue": "perhaps"}, "requeue"),
    ({"launch__max_requeues": -1}, "max_requeues"),
    ({"launch__pack": 2, "dp": 2}, r"launch\.pack=2 with dp=2: .*set dp=1, or launch\.pack=1"),
    ({"launch__goal": "nothing"}, "goal"),
])  # fmt: skip
def test_wrong_fields_are_rejected_by_name(change, message):
    with pytest.raises(ValidationError, match=message):
        config("cpu", **change)


def test_the_shipped_profile_for_this_machine():
    assert config("local").cluster.kind == "local"


@pytest.mark.parametrize("change, same", [
    ({"experiment": "mine"}, True),
    ({"track__wandb__project": "mine"}, True),
    ({"launch__name": "mine"}, True),
    ({"launch__out_dir": "/elsewhere"}, True),
    ({"cluster__time_min": 7}, True),
    ({"seed": 1}, False),
    ({"dp": 2}, False),
    ({"train__steps": 5}, False),
    ({"train__device": "cpu"}, False),
    ({"track__log_every": 7}, False),
    ({"checkpoint__keep": 7}, False),
    ({"target__steps": 7}, False),
])  # fmt: skip
def test_the_result_depends_on_no_names_and_no_places(change, same):
    assert (result_digest(config("cpu", **change)) == result_digest(config("local"))) is same
