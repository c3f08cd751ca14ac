import pytest

from spd_launch.conditions import holds
from spd_launch.errors import LaunchError
from spd_launch.values import Setting, show

RUN = {key: Setting(show(value), value, None) for key, value in {
    "experiment": "tms_5-2", "seed": 2, "train.lr.start": 1e-3, "train.batch_size": 4096,
    "decompose.modules[h.*.mlp]": 50, "train.grad_clip.components": None,
    "decompose.ci_fn.hidden": [16], "decompose.delta_component": False,
}.items()}  # fmt: skip
RUN["losses"] = Setting("pgd", {"pgd_recon": {"coeff": 1.0}}, None)


@pytest.mark.parametrize(
    ("condition", "met"),
    [
        ("seed == 2", True),
        ("1 <= seed < 3", True),
        ("seed != 2 or train.lr.start >= 1e-3", True),
        ("seed > 2 and nothing.of == 'this'", False),
        ("not seed", False),
        ("train.lr.start * train.batch_size < 4.1", True),
        ("(train.batch_size - 96) / 1000 + 2 // 2 == 5", True),
        ("train.batch_size % 2 == 0 and -seed < 0", True),
        ("seed in [0, 1]", False),
        ("seed not in (0, 1)", True),
        ("experiment == 'tms_5-2'", True),
        ('experiment in ("resid_mlp1",)', False),
        ("train.grad_clip.components == null", True),
        ("train.grad_clip.components is not None", False),
        ("decompose.delta_component == false", True),
        ('decompose.modules["h.*.mlp"] <= 50', True),
        ("decompose.ci_fn.hidden == [16]", True),
        ("losses == 'pgd'", True),
        (" seed == 2 ", True),
    ],
)
def test_a_condition_is_met_or_not(condition, met):
    assert holds(condition, RUN) is met


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("sead == 1", "sead is no key that the sweep sets here; did you mean seed"),
        ("train.lr.strat < 1", r"did you mean train\.lr\.start"),
        ("seed <", "it cannot be decided"),
        ("seed < 'a'", "it cannot be decided: '<' not supported"),
        ("1 / 0 == seed", "it cannot be decided: division by zero"),
        ("experiment * 99999999 == 'a'", "arithmetic of other things than numbers"),
        ("9 ** 9 ** 9 > seed", "a condition is made of"),
        ("__import__('os').system('true') == 0", "a condition is made of"),
        ("(lambda: 1)()", "a condition is made of"),
        ("[x for x in (1,)]", "a condition is made of"),
        ("seed if seed else 1", "a condition is made of"),
        ("seed[0] == 1", r"'seed\[0\]' is no key"),
        ("f'{seed}' == '2'", "a condition is made of"),
    ],
)
def test_what_is_no_condition_is_said(condition, message):
    with pytest.raises(LaunchError, match=message):
        holds(condition, RUN)
