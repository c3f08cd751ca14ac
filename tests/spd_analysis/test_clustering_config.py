import pytest

from spd_analysis.clustering.config import DEFAULT, MCMCDraw, RangeDraw, load_config


def test_the_shipped_values_are_those_of_the_issue():
    config = load_config(DEFAULT, [])
    assert config.activation_threshold == 0.01 and config.filter_dead_threshold == 0.001
    assert config.draw == RangeDraw(kind="range", threshold=0.01)


def test_overrides_reach_every_level():
    config = load_config(DEFAULT, [
        "seed=3", "data.n_samples=2", "draw={kind: mcmc, temperature: 0.1}",
        'modules=["linear1"]', "activation_threshold=null", "iters=5",
    ])  # fmt: skip
    assert (config.seed, config.data.n_samples, config.iters) == (3, 2, 5)
    assert config.draw == MCMCDraw(kind="mcmc", temperature=0.1)
    assert config.modules == ["linear1"] and config.activation_threshold is None


@pytest.mark.parametrize("override, message", [
    ("alhpa=1", "alhpa.*fields are seed, data, modules"),
    ("alpha", "'alpha' is no FIELD=VALUE"),
    ("nothing.here=1", "'nothing.here=1' is no FIELD=VALUE"),
    ("alpha=-1", "alpha: Input should be greater than or equal to 0"),
    ("pop_component_prob=1.0", "less than 1"),
    ("draw={kind: mcmc, threshold: 0.1}", "draw.mcmc.temperature"),
    ("draw={kind: best}", "range.*mcmc"),
    ("modules=[]", "modules"),
    ("iters=0", "iters"),
    ("draw={kind: range", "is no YAML"),
])  # fmt: skip
def test_what_is_wrong_is_named(override, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_config(DEFAULT, [override])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no options at"):
        load_config(tmp_path / "mine.yaml", [])
