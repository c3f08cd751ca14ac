"""What the live table shows; that it is waited for is seen in tests/cluster."""

import io
from pathlib import Path

from launch_configs import STORED, config
from rich.console import Console
from test_command import ROOT

from spd_launch.freeze import record
from spd_launch.ledger import mark, new_launch, note_jobs
from spd_launch.snapshot import Snapshot
from spd_launch.status import look
from spd_launch.wait import picture


def test_the_bad_ones_come_first_and_the_rest_is_counted(tmp_path: Path) -> None:
    (tmp_path / "targets" / STORED[0]).mkdir(parents=True)
    runs = [
        ({"seed": str(i)}, config("local", seed=i, launch__out_dir=str(tmp_path)))
        for i in range(30)
    ]
    plan, launch = new_launch(runs)
    record(launch, plan, Snapshot(ROOT, None, None), [])
    ids = [task.run_id for task in plan.tasks]
    note_jobs(launch, "local", dict.fromkeys(ids, "local-0"))
    for i, state in {3: "finished", 29: "failed", 7: "cancelled"}.items():
        mark(launch.run_dir(ids[i]), state)
    console = Console(file=io.StringIO(), width=100, height=20)
    console.print(picture(launch, look(launch), height=20))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) <= 20
    assert lines[0].startswith(launch.launch_id) and "1 failed" in lines[0]
    assert ids[29] in lines[4] and "failed" in lines[4]
    assert lines[-1] == "and 17 more"
