import socket
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spd_launch.ports import FIRST_PORT, Meeting, await_meeting, free_port, hashed_port, publish


@given(st.text(max_size=30), st.integers(0, 50))
def test_port_is_stable_and_below_the_ephemeral_range(run_id: str, restart: int) -> None:
    port = hashed_port(run_id, restart)
    assert FIRST_PORT <= port < 32768
    assert port == hashed_port(run_id, restart)


def test_known_port_does_not_change() -> None:
    # workers of one job may run on different interpreters: never Python's salted hash
    assert hashed_port("tms_5-2-seed0-3fa9", 0) == 25560
    assert hashed_port("tms_5-2-seed0-3fa9", 1) != hashed_port("tms_5-2-seed0-3fa9", 0)


def test_a_taken_port_is_passed_over() -> None:
    run_id = "taken"
    port = free_port(run_id, 0)
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        assert free_port(run_id, 0) != port
    assert free_port(run_id, 0) == port


def test_others_wait_for_rank_0_and_old_attempts_go(tmp_path: Path) -> None:
    (tmp_path / "meeting-11-0.json").write_text("{}")
    file = tmp_path / "meeting-11-1.json"
    meeting = Meeting("node1", 20001, 2)

    def later() -> None:
        time.sleep(0.2)
        publish(file, meeting)

    thread = threading.Thread(target=later)
    thread.start()
    assert await_meeting(file, timeout_s=10) == meeting
    thread.join()
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    with pytest.raises(TimeoutError, match="rank 0 did not publish"):
        await_meeting(tmp_path / "meeting-12-0.json", timeout_s=0.2)
