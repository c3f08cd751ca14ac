import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from spd_core.run_dir import read_metrics
from spd_core.tracking import Tracker


def test_tracker_writes_one_line_per_report(make_config, make_run_dir):
    run_dir = make_run_dir("run")
    tracker = Tracker(make_config(), run_dir, Console(quiet=True), 0)
    with tracker.bar:
        tracker.log(0, {"loss/total": 0.5, "lr": 0.1})
        tracker.advance(1)
        tracker.log(1, {"eval/loss/x": 0.25})
    records = [{k: v for k, v in r.items() if k != "time"} for r in read_metrics(run_dir)]
    assert records == [{"step": 0, "loss/total": 0.5, "lr": 0.1}, {"step": 1, "eval/loss/x": 0.25}]


@pytest.mark.slow
def test_the_loop_works_without_wandb(make_config, make_run_dir):
    run_dir, config = make_run_dir("run"), make_config()
    program = f"""
import sys, torch
from pathlib import Path
sys.modules["wandb"] = None  # whoever imports it gets an ImportError
from spd_core.config import RunConfig
from spd_core.distributed import Dist
from spd_core.run_dir import RunDir
from spd_core.train import train
config = RunConfig.model_validate_json({config.model_dump_json()!r})
run_dir = RunDir(Path({str(run_dir.path)!r}))
dist = Dist(rank=0, world_size=1, device=torch.device("cpu"))
assert train(config, run_dir, dist, lambda _step: False) == "finished"
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
    assert read_metrics(run_dir)
