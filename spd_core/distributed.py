"""Ranks and collectives: the only file that knows torch.distributed.

Convention for losses: each rank returns its (sum, count); the value is sum over ranks divided by
count over ranks, and gradients are SUMMED over ranks.

A rank that fails would leave the others waiting in a collective: `watching` ends them too.
"""

import itertools
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as torch_dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

POLL_S = 1.0  # between two looks at the store
# Looks, not seconds: a suspended job that wakes up finds its clock moved, but nobody dead.
SILENT_POLLS = 30  # a peer whose counter stands still for so many looks is dead
SILENT_POLLS_BROKEN = 3  # the same once a collective broke
BROKEN_S = 6.0  # how long a broken collective waits to hear whose fault it was
FAREWELL_S = 5.0  # how long a failed rank 0, the store's host, lets the others read why
GRACE_S = 10.0  # for a rank to leave by itself when another one failed
STOPPED = "stopped answering (killed?)"
ABSENT, DONE = "absent", "done"

_store: TCPStore | None = None  # set by `init`
_watches = itertools.count()  # numbers the keys of one `watching` after another


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
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_cuda:
        # With one visible GPU per task the local rank does not index the visible list.
        index = local_rank % torch.cuda.device_count()
        torch.cuda.set_device(index)
        torch_device = torch.device("cuda", index)
    else:
        torch_device = torch.device("cpu")
    if world_size > 1:
        global _store
        timeout = timedelta(minutes=10)
        _store = TCPStore(master_addr, master_port, world_size, rank == 0, timeout)
        torch_dist.init_process_group(
            "nccl" if use_cuda else "gloo",
            store=_store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    return Dist(rank, world_size, torch_device)


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
    tensor = torch.tensor(float(flag), device=dist.device)
    torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MAX)
    return bool(tensor.item())


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

    A rank that stays blocked in spite of it calls `on_failure` and exits with code 1. Rank 0
    leaves last.

    Raises:
        PeerFailed: another rank failed first.
    """
    if dist.world_size == 1:
        yield
        return
    watch = _Watch(dist, on_failure)
    try:
        yield
    except BaseException as error:
        watch.leave(error)
        raise
    watch.leave(None)


class _Watch:
    """One rank's place in the store: it counts in `beat/RANK`; the first failure is in `error`.

    Rank 0 watches all and all watch rank 0. One thread talks to the store. A second one ends the
    process, also where the first is blocked: a call to a store whose machine is lost never returns.
    """

    def __init__(self, dist: Dist, on_failure: Callable[[], None]) -> None:
        assert _store is not None, "distributed.init comes first"
        client = TCPStore(_store.host, _store.port, timeout=timedelta(seconds=SILENT_POLLS))
        self.store = PrefixStore(f"watch/{next(_watches)}", client)
        self.dist, self.on_failure = dist, on_failure
        self.others = [rank for rank in range(dist.world_size) if rank != dist.rank]
        self.own: str | None = None  # this rank's error
        self.failure: str | None = None  # another's, which came first
        self.broken = False  # a collective broke
        self.polls = 0
        self.beats: dict[int, tuple[str, int]] = {}  # last value, looks since it moved
        self.leaving, self.left = threading.Event(), threading.Event()
        self.talker = threading.Thread(target=self._talk, daemon=True)
        self.talker.start()
        threading.Thread(target=self._guard, daemon=True).start()

    def leave(self, error: BaseException | None) -> None:
        if isinstance(error, SystemExit) and not error.code:
            error = None
        if error is not None:
            self.broken = _from_collective(error)
            self.talker.join(BROKEN_S if self.broken else 0)  # it ends where another failed
            what = "".join(traceback.format_exception_only(error)).strip()
            own = f"rank {self.dist.rank} on {socket.gethostname()} failed first: {what}"
            self.own = own.encode(errors="replace").decode()  # a path in it may not be UTF-8
        elif self.dist.is_main:
            while self.talker.is_alive() and not self._others_done():
                self.talker.join(POLL_S / 5)
        self.leaving.set()
        self.talker.join()
        if self.dist.is_main and (error is not None or self.failure is not None):
            deadline = time.monotonic() + FAREWELL_S
            while time.monotonic() < deadline and not self._others_done():
                time.sleep(POLL_S / 5)
        self.left.set()
        if self.failure is not None and (error is None or isinstance(error, Exception)):
            message = f"{self.failure}; this rank ({self.dist.rank}) was stopped by it"
            raise PeerFailed(message) from error

    def _talk(self) -> None:
        beat = f"beat/{self.dist.rank}"
        try:
            while self.failure is None and not self.leaving.wait(POLL_S):
                self.polls += 1
                self.store.set(beat, str(self.polls))
                self.failure = self._look()
            if self.own is not None and self.failure is None:
                first = self._publish(self.own)
                self.failure = None if first == self.own else first
            self.store.set(beat, DONE)
        except torch_dist.DistError:
            self.failure = self.failure or f"rank 0 {STOPPED}"

    def _look(self) -> str | None:
        """The first failure, if there is one."""
        error = self._read("error")
        if error != ABSENT:
            return error
        for peer in self.others if self.dist.is_main or self.broken else (0,):
            beat, (last, looks) = self._read(f"beat/{peer}"), self.beats.get(peer, ("", 0))
            self.beats[peer] = (beat, looks + 1 if beat == last != DONE else 0)
            if self.beats[peer][1] >= (SILENT_POLLS_BROKEN if self.broken else SILENT_POLLS):
                return self._publish(f"rank {peer} {STOPPED}")
        return None

    def _guard(self) -> None:
        last, looks = -1, 0
        while self.failure is None and looks < SILENT_POLLS:
            last, looks = self.polls, looks + 1 if self.polls == last else 0
            if self.left.wait(POLL_S):
                return
        failure = self.failure or f"rank 0 {STOPPED}"
        print(f"{failure}; this rank ({self.dist.rank}) ends", file=sys.stderr, flush=True)
        if not self.left.wait(GRACE_S):
            try:
                self.on_failure()
            finally:
                os._exit(1)

    def _publish(self, error: str) -> str:
        """What was published first, by whichever rank."""
        return self.store.compare_set("error", "", error).decode()

    def _read(self, key: str) -> str:
        """Unlike `get`, does not wait for a key that is not there."""
        return self.store.compare_set(key, ABSENT, ABSENT).decode()

    def _others_done(self) -> bool:
        return all(self._read(f"beat/{rank}") == DONE for rank in self.others)


def _from_collective(error: BaseException) -> bool:
    """Told by the place, since gloo raises plain RuntimeErrors."""
    places = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError) and any(
        "torch/distributed" in p.filename for p in places
    )
