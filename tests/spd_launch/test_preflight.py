import gc
import socket
from pathlib import Path

import pytest
import torch

from spd_core.distributed import Dist
from spd_core.run_dir import RunDir
from spd_launch.preflight import check_code, check_node, load_torch


def test_code_from_anywhere_but_the_launchs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SPD_CODE", str(Path(__file__).parents[2]))
    check_code()
    monkeypatch.setenv("SPD_CODE", str(tmp_path))
    with pytest.raises(RuntimeError, match=f"is not in the launch's code, {tmp_path}"):
        check_code()


def test_a_node_that_cannot_train_is_named_before_it_does(make_run_dir):
    run_dir, here = make_run_dir("run"), Dist(0, 1, torch.device("cpu"))
    before = list(run_dir.path.iterdir())
    check_node(run_dir, here)
    assert list(run_dir.path.iterdir()) == before
    away = RunDir(run_dir.path / "not there")
    with pytest.raises(RuntimeError, match=f"{socket.gethostname()} is not fit .*--exclude="):
        check_node(away, here)
    if not torch.cuda.is_available():
        gpu = Dist(0, 1, torch.device("cuda", 0))
        with pytest.raises(RuntimeError, match="is not fit to train"):
            check_node(run_dir, gpu)


def test_garbage_is_looked_for_again_when_torch_is_there():
    load_torch()
    gc.unfreeze()  # of this process, which goes on to other tests
    loop: list[object] = []
    loop.append(loop)
    del loop
    assert gc.isenabled() and gc.collect() > 0
