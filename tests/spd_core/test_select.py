"""What of a target's output is reconstructed; through a decomposition, see test_component_model."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from spd_core.targets.select import select_output

LOGITS, HIDDEN = torch.ones(2), torch.zeros(3)
Pair = namedtuple("Pair", "logits hidden")
FIELDS = {"logits": LOGITS, "hidden": HIDDEN}


@pytest.mark.parametrize("raw, output", [
    (LOGITS, None), ([LOGITS, HIDDEN], 0), ((HIDDEN, LOGITS), -1), (Pair(LOGITS, HIDDEN), -2),
    (Pair(LOGITS, HIDDEN), "logits"), (FIELDS, "logits"), (SimpleNamespace(**FIELDS), "logits"),
])  # fmt: skip
def test_an_index_a_key_or_an_attribute(raw, output):
    assert select_output(raw, output) is LOGITS


@pytest.mark.parametrize("raw, output, there", [
    (LOGITS, 0, "a Tensor with no fields"), (LOGITS, "T", "a Tensor with no fields"),
    ((LOGITS, HIDDEN), 2, "a tuple with 0, 1"), (FIELDS, None, "a dict with logits, hidden"),
    (SimpleNamespace(loss=None), "loss", "a SimpleNamespace with loss"), (None, None, "NoneType"),
])  # fmt: skip
def test_where_there_is_no_tensor_the_message_names_what_is(raw, output, there):
    with pytest.raises(ValueError, match=rf"target\.output={output}: the target returns .*{there}"):
        select_output(raw, output)
