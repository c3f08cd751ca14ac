"""What Slurm answers, read; that it answers so is seen in tests/cluster."""

import pytest

from spd_launch.slurm_state import array_tasks


@pytest.mark.parametrize(
    ("job_id", "tasks"),
    [
        ("7", ["7"]),
        ("7_3", ["7_3"]),
        ("7_[1-3]", ["7_1", "7_2", "7_3"]),
        ("7_[1,3%2]", ["7_1", "7_3"]),
        ("7_[0-1,5,8-9%4]", ["7_0", "7_1", "7_5", "7_8", "7_9"]),
        ("7_[0-6:3]", ["7_0", "7_3", "7_6"]),
    ],
)
def test_tasks_that_slurm_sums_up(job_id: str, tasks: list[str]) -> None:
    assert array_tasks(job_id) == tasks
