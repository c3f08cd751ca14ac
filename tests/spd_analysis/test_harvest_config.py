import pytest

from spd_analysis.harvest.config import DEFAULT, load_config


def test_the_shipped_values_load_and_can_be_changed():
    assert load_config(DEFAULT, []).batch_size is None
    assert load_config(DEFAULT, ["top_k=7", "window=0"]).top_k == 7


@pytest.mark.parametrize("override", ["top_k=0", "window=-1", "threshold=2", "batchs=3"])
def test_what_is_wrong_is_named(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        load_config(DEFAULT, [override])
