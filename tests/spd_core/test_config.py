import pytest
from pydantic import ValidationError

from spd_core.config import config_digest, load_config
from spd_launch.config import config_to_yaml


def test_yaml_round_trip(make_config, tmp_path):
    config = make_config("seed=3", "+losses.faithfulness.coeff=0.1")
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    with pytest.raises(ValueError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")


def test_digest_depends_on_values_alone(make_config):
    one, same = make_config("seed=1").target, make_config("seed=2").target
    assert config_digest(one) == config_digest(same)
    assert config_digest(one) != config_digest(
        make_config("target.lr.start=2e-2", "target.lr.end=2e-2").target
    )


def test_configs_are_frozen(make_config):
    with pytest.raises(ValidationError):
        make_config().seed = 4


@pytest.mark.parametrize("overrides, message", [
    (["+train.stepz=5"], "stepz"),
    (["+colour=red"], "colour"),
    (["+losses.pgd_rekon.coeff=1"], "pgd_rekon"),
    (["train.steps=0"], "train.steps"),
    (["train.steps=2.5"], "train.steps"),
    (["train.batch_size=33", "dp=2"], r"train.batch_size=33 .* dp=2"),
    (["eval.batch_size=1", "dp=2"], r"eval.batch_size=1 .* dp=2"),
    (["train.microbatch_size=6"], r"microbatch_size=6 .* 32 examples"),
    (["train.microbatch_size=32", "dp=2"], r"microbatch_size=32 .* 16 examples"),
    (["+losses.mine={coeff:1.0}"], r"losses.mine.path"),
    (["+losses.mine={coeff:1.0,path:nowhere}"], r"losses.mine.path"),
    (["train.lr.kind=constant"], "start == end"),
    (["train.lr.warmup_fraction=1.5"], "warmup_fraction"),
    (["losses.importance_minimality.p_anneal_end_frac=0.5"], "p_anneal_end_frac"),
    (["losses.importance_minimality.p=0"], "importance_minimality.p"),
    (["losses={importance_minimality:null,stochastic_recon:null,stochastic_recon_layerwise:null}"],
     "at least one loss"),
    (["decompose.sampling=gaussian"], "decompose.sampling"),
    (["decompose.modules.linear1=0"], "linear1"),
    (["decompose.tied=[[linear1]]"], "tied"),
    (["checkpoint.keep=0"], "checkpoint.keep"),
    (["data.feature_probability=0"], "feature_probability"),
    (["+losses.stochastic_recon_subset={coeff:1.0,routing:{kind:uniform_k_subset,p:0.5}}"], "p"),
    (["+losses.stochastic_recon_subset={coeff:1.0}"], "routing"),
])  # fmt: skip
def test_wrong_configs_are_rejected_by_name(overrides, message, make_config):
    with pytest.raises(ValidationError, match=rf"(?s){message}"):
        make_config(*overrides)


def test_the_shipped_config_is_valid(shipped_config):
    assert shipped_config.decompose.modules == {"linear1": 20, "linear2": 20}
