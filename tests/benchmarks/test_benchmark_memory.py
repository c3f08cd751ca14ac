"""Memory that is counted falls by what is not kept."""

import shutil

import pytest
import torch

from benchmarks.memory import How, peak_mib

# So many tokens that weights are the smaller part.
SMALL = ["data=stories", "data.seq_len=64", "train.batch_size=32", "train.autocast=off",
         "decompose.modules={h.*.attn.*_proj:null,h.*.mlp.*_proj:null,h.*.mlp.up_proj:300}",
         "decompose.ci_fn.hidden=[300]"]  # fmt: skip
HOW: list[How] = ["naive", "off", "ci_fns"]


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None or " " in torch.__file__,
    reason="on a CPU torch.compile needs g++, and PyTorch in a path without a space",
)
def test_each_way_takes_less_than_the_one_before() -> None:
    found = [peak_mib("ss_llama_simple", SMALL, how) for how in HOW]
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found)
    # Four modules' importances before and after the sigmoid, and x V, at all 2,048 positions.
    assert found[2] > 4 * 3 * 4 * 32 * 64 * 300 / 2**20
