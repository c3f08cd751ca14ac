"""Against OmegaConf, whose semantics these functions have."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spd_launch.values import Setting, references, resolve, show, split_key, with_value

KEYS = st.sampled_from("abcd")
SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["x", "some words", 1e-3])
)
TREES = st.dictionaries(
    KEYS,
    st.recursive(SCALARS, lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=6),
    max_size=4,
)
PATHS = st.lists(KEYS, min_size=1, max_size=3)


@given(TREES, PATHS, SCALARS | TREES)
def test_setting_a_value_is_what_omegaconf_does(tree, path, value):
    before = copy.deepcopy(tree)
    expected = OmegaConf.create(tree)
    OmegaConf.update(expected, ".".join(path), value, merge=True, force_add=True)
    assert with_value(tree, tuple(path), value) == OmegaConf.to_container(expected)
    assert tree == before


@given(TREES, st.lists(st.tuples(PATHS, PATHS), max_size=4))
def test_references_are_what_omegaconf_says(tree, pairs):
    for place, wanted in pairs:
        tree = with_value(tree, tuple(place), f"${{{'.'.join(wanted)}}}")
    try:
        expected = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except (OmegaConfBaseException, RecursionError):  # to nothing, or in a circle
        return
    assert resolve(tree) == expected


def test_references_of_all_kinds(monkeypatch):
    monkeypatch.setenv("SPD_TEST", "here")
    tree = {
        "a": {"p": 2.0, "final": "${.p}", "up": "${..b}", "chain": "${c.d}"},
        "b": 3,
        "c": {"d": "${a.final}", "text": "${b} times", "env": "${oc.env:SPD_TEST}", "all": "${a}"},
        "list": [1, "${b}", {"x": "${c.text}"}],
        "none": "${null_}",
        "null_": None,
    }
    simple = {key: tree[key] for key in ("a", "b", "none", "null_")} | {"c": {"d": "${a.final}"}}
    for one in (simple, tree):
        assert resolve(one) == OmegaConf.to_container(OmegaConf.create(one), resolve=True)
    assert resolve(simple)["a"] == {"p": 2.0, "final": 2.0, "up": 3, "chain": 2.0}
    assert {".".join(path) for path, _ in references(tree)} == {
        "a.final", "a.up", "a.chain", "c.d", "c.text", "c.env", "c.all",
        "list.1", "list.2.x", "none",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["${nothing}", "${a.nothing}", "${.x}x${gone}", "${missing}"])
def test_a_reference_to_nothing_is_an_error(text):
    with pytest.raises(OmegaConfBaseException):
        resolve({"a": {"b": 1}, "missing": "???", "x": text})


def test_keys_with_brackets():
    assert split_key("a.b[c.*.d]") == ("a", "b", "c.*.d")
    tree = with_value({"modules": {"h.*": 3}}, split_key("modules[h.*]"), 5)
    assert tree == {"modules": {"h.*": 5}}
    assert with_value({"a": [1, {"b": 2}]}, ("a", "1", "b"), 3) == {"a": [1, {"b": 3}]}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.003, "0.003"), (None, "null"), (True, "true"), ("word", "word"), ([16, 2], "[16,2]")],
)
def test_values_are_shown_as_they_are_typed(value, shown):
    assert show(value) == shown
    assert Setting(show(value), value, None).shown == shown
