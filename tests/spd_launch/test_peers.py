"""A rank that fails ends the others, and they say why: real processes over gloo."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time

import pytest
import torch

from spd_core import distributed
from spd_launch.peers import watching

BOOM = f"on {socket.gethostname()} failed first: ValueError: boom"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def meet(dist):
    distributed.all_reduce("sum", torch.ones(1), dist)


def rank_main(rank, world, port, folder, body, arguments):
    torch.set_num_threads(1)
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    dist = distributed.init(rank, world, rank, f"127.0.0.1:{port}", "cpu")
    with watching(dist, "127.0.0.1"):
        meet(dist)
    with watching(dist, "127.0.0.1", (folder / f"marked-{rank}").touch):
        body(dist, *arguments)


def run_ranks(world, folder, body, *arguments):
    """Each rank's exit code and the lines of its stderr; fails where one takes a minute."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "spd_core.train"])
    rest = (world, free_port(), folder, body, arguments)
    ranks = [context.Process(target=rank_main, args=(rank, *rest)) for rank in range(world)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 60
    try:
        for process in ranks:
            process.join(timeout=deadline - time.monotonic())
        errors = [(folder / f"stderr-{rank}").read_text().splitlines() for rank in range(world)]
        return [(p.exitcode, lines) for p, lines in zip(ranks, errors, strict=True)]
    finally:
        for process in ranks:
            process.kill()


def fail_while_others_meet(dist, failing, error):
    if dist.rank == failing:
        raise error
    while True:
        meet(dist)


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_ends_ranks_that_wait_in_a_collective(tmp_path, failing):
    answers = run_ranks(3, tmp_path, fail_while_others_meet, failing, ValueError("boom"))
    for rank, (code, lines) in enumerate(answers):
        assert code == 1
        if rank == failing:
            assert lines[-1] == "ValueError: boom"
        else:
            wanted = f"rank {failing} {BOOM}; this rank ({rank}) was stopped by it"
            assert lines[-1] == f"spd_launch.peers.PeerFailed: {wanted}"
            assert any("direct cause" in line for line in lines)  # the broken collective's error
    assert not list(tmp_path.glob("marked-*"))  # all left by themselves


def test_leaving_the_process_is_a_failure(tmp_path):
    answers = run_ranks(2, tmp_path, fail_while_others_meet, 1, SystemExit(3))
    assert [code for code, _ in answers] == [1, 3]
    assert "failed first: SystemExit: 3; this rank (0)" in answers[0][1][-1]


def fail_one_after_the_other(dist):
    if dist.rank == 1:
        raise RuntimeError("boom")
    time.sleep(2)
    raise ValueError("later")


def test_an_error_of_ones_own_does_not_wait_for_another(tmp_path):
    """gloo's errors are RuntimeErrors too, and those do wait."""
    (_, main_lines), (_, lines) = run_ranks(2, tmp_path, fail_one_after_the_other)
    assert lines[-1] == "RuntimeError: boom" and "ValueError: later" in main_lines
    assert "failed first: RuntimeError: boom; this rank (0)" in main_lines[-1]


def die_while_others_meet(dist, dying):
    if dist.rank == dying:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        meet(dist)


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 2])
def test_a_killed_rank_is_named(tmp_path, dying):
    answers = run_ranks(3, tmp_path, die_while_others_meet, dying)
    for rank, (code, lines) in enumerate(answers):
        if rank == dying:
            assert code == -signal.SIGKILL
        else:
            wanted = f"rank {dying} stopped answering (killed?); this rank ({rank}) was stopped"
            assert code == 1 and wanted in lines[-1]


def fail_while_others_are_busy(dist):
    if dist.rank == 1:
        raise ValueError("boom")
    time.sleep(100)
    meet(dist)


@pytest.mark.slow
def test_an_error_ends_a_rank_that_does_not_listen(tmp_path):
    (main_code, main_lines), _ = run_ranks(2, tmp_path, fail_while_others_are_busy)
    assert main_code == 1
    assert main_lines[0] == f"rank 1 {BOOM}; this rank (0) ends"
    assert [path.name for path in tmp_path.glob("marked-*")] == ["marked-0"]


def finish_late(dist, late):
    meet(dist)
    if dist.rank == late:
        time.sleep(2)
    else:
        sys.exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_ranks_may_finish_at_different_times(tmp_path, late):
    assert run_ranks(2, tmp_path, finish_late, late) == [(0, []), (0, [])]


def test_one_process_watches_nobody(one_process):
    threads = threading.active_count()
    with pytest.raises(ValueError, match="boom"), watching(one_process, "127.0.0.1"):
        assert threading.active_count() == threads
        raise ValueError("boom")
