"""A rank that fails ends the others, and they say why.

Every rank holds a line to rank 0, which hears whose breaks, or who says an error, first.
"""

import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spd_core.distributed import Dist

BLAME_S = 1.5  # an error waits to hear of another that came first: a killed peer breaks collectives
FAREWELL_S = 5.0  # for the answer to an error
GRACE_S = 10.0  # for a rank to leave by itself when another one failed
CALL_S = 60.0  # for all ranks to come to `watching`
DONE = "done"


class PeerFailed(RuntimeError):
    """Another rank failed first; the message begins with its error."""


@contextmanager
def watching(
    dist: "Dist", main_address: str, on_failure: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """While every rank is in here, all end within a minute of one's failure.

    `main_address` is the host of rank 0. A rank that stays blocked in spite of it calls
    `on_failure` and exits with code 1. All leave together.

    Raises:
        PeerFailed: another rank failed first.
    """
    if dist.world_size == 1:
        yield
        return
    line, own, error = _call_main(dist, main_address), DONE, None
    first: futures.Future[str] = futures.Future()  # the first failure, or DONE
    left = threading.Event()

    def listen() -> None:
        first.set_result(_hear(line, 0))
        if first.result() in (DONE, own):
            return
        print(f"{first.result()}; this rank ({dist.rank}) ends", file=sys.stderr, flush=True)
        if not left.wait(GRACE_S):
            try:
                on_failure()
            finally:
                os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    except BaseException as caught:
        error = caught
        if not isinstance(error, SystemExit) or error.code:
            futures.wait([first], BLAME_S)
            what = "".join(traceback.format_exception_only(error)).strip()
            own = f"rank {dist.rank} on {socket.gethostname()} failed first: {what}"
        raise
    finally:
        _say(line, own)
        futures.wait([first], None if own == DONE else FAREWELL_S)
        left.set()
        stopped = first.done() and first.result() not in (DONE, own)
        if stopped and (error is None or isinstance(error, Exception)):
            message = f"{first.result()}; this rank ({dist.rank}) was stopped by it"
            raise PeerFailed(message) from error


def _call_main(dist: "Dist", main_address: str) -> Connection:
    """A line to the switchboard at rank 0; over it each rank says, and hears, one word."""
    import torch  # not at plan time

    from spd_core.distributed import broadcast

    port = torch.zeros((), dtype=torch.long, device=dist.device)
    if dist.is_main:
        server = socket.create_server(("", 0), backlog=dist.world_size)
        threading.Thread(target=_switchboard, args=(server, dist.world_size), daemon=True).start()
        port += server.getsockname()[1]
    broadcast(port, dist)
    line = _line(socket.create_connection((main_address, int(port))))
    _say(line, str(dist.rank))
    return line


def _switchboard(server: socket.socket, world_size: int) -> None:
    """Hear of every rank an error or DONE; tell all the first error, or DONE when all are."""
    with server:
        server.settimeout(CALL_S)
        lines = [_line(server.accept()[0]) for _ in range(world_size)]
    ranks = {line: int(_hear(line, -1)) for line in lines}
    lines.sort(key=ranks.__getitem__, reverse=True)  # rank 0 is told last: it takes this along
    told = False
    while ranks:
        for line in ranks.keys() & wait(list(ranks)):
            word = _hear(line, ranks.pop(line))
            if not told and (word != DONE or not ranks):
                told = True
                for other in lines:
                    _say(other, word)


def _line(end: socket.socket) -> Connection:
    """It breaks where the other end is killed or its machine lost, not where it is suspended."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":  # lost after 10 + 4 x 5 s; elsewhere all ranks are on one machine
        for option, value in (("IDLE", 10), ("INTVL", 5), ("CNT", 4)):
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{option}"), value)
    return Connection(end.detach())


def _say(line: Connection, word: str) -> None:
    with suppress(OSError):  # the other end is gone
        line.send_bytes(word.encode(errors="surrogatepass"))  # a path may be no UTF-8


def _hear(line: Connection, rank: int) -> str:
    try:
        return line.recv_bytes().decode(errors="surrogatepass")
    except (EOFError, OSError):
        return f"rank {rank} stopped answering (killed?)"
