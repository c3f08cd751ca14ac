import pytest

from spd_analysis.options import load_options
from spd_core.base_config import BaseConfig, Count


class Inner(BaseConfig):
    x: Count


class Outer(BaseConfig):
    name: str
    inner: Inner


@pytest.fixture
def file(tmp_path):
    (tmp_path / "options.yaml").write_text("name: a\ninner: {x: 1}\n")
    return tmp_path / "options.yaml"


def test_overrides_take_the_place_of_what_the_file_says(file):
    assert load_options(Outer, file, []) == Outer(name="a", inner=Inner(x=1))
    assert load_options(Outer, file, ["inner.x=3", "name=b"]) == Outer(name="b", inner=Inner(x=3))
    assert load_options(Outer, file, ["inner={x: 4}"]).inner.x == 4


@pytest.mark.parametrize("override, message", [
    ("nmae=b", "nmae: Extra inputs .*fields are name, inner"),
    ("inner.x=0", "inner.x: .*greater than or equal to 1"),
    ("name", "'name' is no FIELD=VALUE"),
    ("name.x=1", "'name.x=1' is no FIELD=VALUE"),
    ("inner={x", "is no YAML"),
])  # fmt: skip
def test_what_is_wrong_is_named(override, message, file):
    with pytest.raises(ValueError, match=message):
        load_options(Outer, file, [override])


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="no options at"):
        load_options(Outer, tmp_path / "mine.yaml", [])
    (tmp_path / "mine.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is no YAML"):
        load_options(Outer, tmp_path / "mine.yaml", [])
