import subprocess
import sys

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_measures_instead():
    command = [sys.executable, "-m", "benchmarks.gpu", "--only", "tms_5-2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "no GPU" in done.stderr and "just bench" in done.stderr
