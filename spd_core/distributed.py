"""Ranks and collectives: the only file that knows torch.distributed.

Convention for losses: each rank returns its (sum, count); the value is sum over ranks divided by
count over ranks, and gradients are SUMMED over ranks.

A rank that fails would leave the others waiting in a collective: `watching` ends them too.
"""

import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Literal

import torch
import torch.distributed as torch_dist
from jaxtyping import Float
from torch import Tensor

BLAME_S = 1.5  # an error waits to hear of another that came first: a killed peer breaks collectives
FAREWELL_S = 5.0  # for the answer to an error
GRACE_S = 10.0  # for a rank to leave by itself when another one failed
CALL_S = 60.0  # for all ranks to come to `watching`
DONE = "done"

_main_address = ""  # set by `init`


class PeerFailed(RuntimeError):
    """Another rank failed first; the message begins with its error."""


@dataclass(frozen=True)
class Dist:
    """Where this process stands among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init(
    rank: int,
    world_size: int,
    local_rank: int,
    master_addr: str,
    master_port: int,
    device: Literal["auto", "cpu", "cuda"],
) -> Dist:
    """Join the process group (none for one process) on gloo or nccl.

    Raises:
        ValueError: device is "cuda" and torch sees no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "train.device=cuda, but torch sees no GPU; use train.device=cpu, or cluster=cpu"
        )
    place = torch.device("cpu")
    if device != "cpu" and torch.cuda.is_available():
        # With one visible GPU per task the local rank does not index the visible list.
        place = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
    if world_size > 1:
        global _main_address
        _main_address, url = master_addr, f"tcp://{master_addr}:{master_port}"
        backend = "nccl" if place.type == "cuda" else "gloo"
        torch_dist.init_process_group(backend, url, timedelta(minutes=10), world_size, rank)
    return Dist(rank, world_size, place)


def shutdown() -> None:
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def all_sum(tensor: Float[Tensor, "..."], dist: Dist) -> Float[Tensor, "..."]:
    """Sum over ranks; a new tensor, detached."""
    result = tensor.detach().clone()
    if dist.world_size > 1:
        torch_dist.all_reduce(result)
    return result


def all_min(tensor: Tensor, dist: Dist) -> Tensor:
    """Elementwise minimum over ranks; a new tensor, detached."""
    result = tensor.detach().clone()
    if dist.world_size > 1:
        torch_dist.all_reduce(result, op=torch_dist.ReduceOp.MIN)
    return result


def all_sum_with_grad(tensor: Float[Tensor, "..."], dist: Dist) -> Float[Tensor, "..."]:
    """Sum over ranks whose gradient reaches this rank's part.

    The gradient is scaled by world_size because a value that is whole on every rank is divided by
    the summed count (see the convention above).
    """
    if dist.world_size == 1:
        return tensor
    return all_sum(tensor, dist) + dist.world_size * (tensor - tensor.detach())


def sum_gradients(parameters: Iterable[torch.nn.Parameter], dist: Dist) -> None:
    """Sum `.grad` over ranks in one flattened collective."""
    if dist.world_size == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    torch_dist.all_reduce(flat)
    for grad, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


def broadcast(tensor: Tensor, dist: Dist) -> None:
    """Make the tensor rank 0's, in place."""
    if dist.world_size > 1:
        torch_dist.broadcast(tensor, 0)


def any_rank(flag: bool, dist: Dist) -> bool:
    """Whether the flag is set on at least one rank; the same answer on all."""
    if dist.world_size == 1:
        return flag
    return bool(all_sum(torch.tensor(float(flag), device=dist.device), dist))


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def barrier(dist: Dist) -> None:
    if dist.world_size > 1:
        torch_dist.barrier()


@contextmanager
def watching(dist: Dist, on_failure: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While every rank is in here, all end within a minute of one's failure.

    A rank that stays blocked in spite of it calls `on_failure` and exits with code 1. All leave
    together.

    Raises:
        PeerFailed: another rank failed first.
    """
    if dist.world_size == 1:
        yield
        return
    line, own, error = _call_main(dist), DONE, None
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


def _call_main(dist: Dist) -> Connection:
    """A line to the switchboard at rank 0; over it each rank says, and hears, one word."""
    port = torch.zeros((), dtype=torch.long, device=dist.device)
    if dist.is_main:
        server = socket.create_server(("", 0), backlog=dist.world_size)
        threading.Thread(target=_switchboard, args=(server, dist.world_size), daemon=True).start()
        port += server.getsockname()[1]
    broadcast(port, dist)
    line = _line(socket.create_connection((_main_address, int(port))))
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
