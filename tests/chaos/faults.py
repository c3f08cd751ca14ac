"""The ways in which a run is broken on this machine. Each is a function of a `Scene`."""

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from disk import Disk
from runs import Run, steps_saved, wait

from spd_core.run_dir import read_metrics

MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")


@dataclass
class Scene:
    """A run that works, on a disk."""

    run: Run
    disk: Disk
    random: random.Random
    undo: list[Callable[[], None]] = field(default_factory=list)

    def sleep(self) -> None:
        """Until any moment: of its start, or of a step soon to come, or after the last one."""
        if self.random.random() < 0.25:
            self._until(lambda: False, self.random.random() * 2)
            return
        step = self.step() + self.random.randrange(6)
        self._until(lambda: self.step() >= step, timeout_s=60)
        self._until(lambda: False, self.random.random() * 0.1)

    def _until(self, reached: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.run.works and not reached():
            time.sleep(0.002)

    def step(self) -> int:
        """What the last line of metrics.jsonl says; 0 where there is none."""
        with suppress(OSError):
            records = read_metrics(self.run.run_dir)
            return int(records[-1]["step"]) if records else 0
        return 0

    def signal(self, number: int, ranks: str) -> None:
        """To all ranks as fast as it goes, or to one of them."""
        chosen = self.run.ranks if ranks == "all" else [self.random.choice(self.run.ranks)]
        for rank in chosen:
            assert rank.pid is not None
            with suppress(ProcessLookupError):
                os.kill(rank.pid, number)


def kill_one_rank(scene: Scene) -> None:
    scene.sleep()
    scene.signal(signal.SIGKILL, "one")


def kill_all_ranks(scene: Scene) -> None:
    scene.sleep()
    scene.signal(signal.SIGKILL, "all")


def kill_during_a_checkpoint(scene: Scene) -> None:
    scene.sleep()
    while scene.run.works and not any(scene.run.run_dir.checkpoints.glob(".step_*")):
        pass
    time.sleep(scene.random.random() * 0.02)
    scene.signal(signal.SIGKILL, "all")


def terminate_all(scene: Scene) -> None:
    scene.sleep()
    scene.signal(signal.SIGTERM, "all")


def terminate_one(scene: Scene) -> None:
    scene.sleep()
    scene.signal(signal.SIGTERM, "one")


def interrupt(scene: Scene) -> None:
    scene.sleep()
    scene.signal(signal.SIGINT, "all")


def terminate_then_kill(scene: Scene) -> None:
    """The grace period ends while the run may still be saving."""
    terminate_all(scene)
    time.sleep(scene.random.random() * 0.1)
    for rank in scene.run.ranks:
        rank.kill()


def damage_newest_checkpoint(scene: Scene) -> None:
    scene.sleep()
    scene.signal(signal.SIGKILL, "all")
    wait(scene.run)
    if scene.run.state == "finished" or not (steps := steps_saved(scene.run)):
        return
    folder = scene.run.run_dir.checkpoints / f"step_{steps[-1]}"
    file = folder / scene.random.choice(["state.safetensors", "state.safetensors", "meta.json"])
    data = bytearray(file.read_bytes())
    match scene.random.choice(["cut", "flip", "zero", "remove", "empty folder"]):
        case "cut":
            file.write_bytes(data[: scene.random.randrange(len(data))])
        case "flip":
            data[scene.random.randrange(len(data))] ^= 1 << scene.random.randrange(8)
            file.write_bytes(data)
        case "zero":  # what some file systems leave after a power failure
            file.write_bytes(bytes(len(data)))
        case "remove":
            file.unlink()
        case "empty folder":
            for file in folder.iterdir():
                file.unlink()


def half_a_line(scene: Scene) -> None:
    """A kill in the middle of a line of metrics.jsonl, or lines that came after a checkpoint."""
    scene.sleep()
    scene.signal(signal.SIGKILL, "all")
    wait(scene.run)
    if scene.run.run_dir.metrics_file.exists():
        with open(scene.run.run_dir.metrics_file, "ab") as file:
            file.write(scene.random.choice([b'{"step": 7, "loss/to', b"{", bytes(100)]))


def order(scene: Scene, what: str) -> None:
    rank = scene.random.randrange(scene.run.dp)
    scene.sleep()
    if scene.run.works:
        (scene.run.orders / f"order-{rank}").write_text(what)


def exception(scene: Scene) -> None:
    order(scene, "raise")


def exit_without_a_word(scene: Scene) -> None:
    order(scene, "exit")


def loss_not_finite(scene: Scene) -> None:
    order(scene, "nan")


def out_of_memory(scene: Scene) -> None:
    """The kernel's kill where a memory group can be made, else an allocation that fails."""
    rank = scene.random.choice(scene.run.ranks)
    assert rank.pid is not None
    group = MEMORY_GROUPS / f"spd-chaos-{rank.pid}"
    if os.geteuid() == 0 and MEMORY_GROUPS.is_dir():
        group.mkdir()
        scene.undo.append(group.rmdir)
        (group / "memory.limit_in_bytes").write_text(str(2**30))
        (group / "cgroup.procs").write_text(str(rank.pid))
    else:
        resource.prlimit(rank.pid, resource.RLIMIT_AS, (4 * 2**30,) * 2)
    scene.sleep()
    (scene.run.orders / f"order-{scene.run.ranks.index(rank)}").write_text("memory")


def disk_full(scene: Scene) -> None:
    scene.sleep()
    scene.disk.fill(left_kb=scene.random.choice([0, 4, 40, 200]))


def files_limited(scene: Scene) -> None:
    """Files may not grow beyond a size, as by a quota: writes end in the middle."""
    limit = scene.random.choice([0, 100, 1000, 20_000])
    scene.sleep()
    for rank in scene.run.ranks:
        if rank.is_alive() and rank.pid is not None:
            resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (limit, limit))


def read_only(scene: Scene) -> None:
    scene.undo.append(scene.disk.repair)
    scene.sleep()
    scene.disk.break_down()


Fault = Callable[[Scene], None]


def kill_launcher(scene: Scene) -> None:
    """Its ranks end by themselves."""
    assert scene.run.launcher is not None
    ranks = _children(scene.run.launcher.pid)
    scene.sleep()
    ranks += _children(scene.run.launcher.pid)
    scene.run.launcher.kill()
    while any(Path("/proc", str(pid), "fd").exists() for pid in ranks):
        time.sleep(0.05)


def terminate_launcher(scene: Scene) -> None:
    scene.sleep()
    assert scene.run.launcher is not None
    scene.run.launcher.terminate()


def kill_rank_of_launcher(scene: Scene) -> None:
    scene.sleep()
    assert scene.run.launcher is not None
    if ranks := _children(scene.run.launcher.pid):
        with suppress(ProcessLookupError):
            os.kill(scene.random.choice(ranks), signal.SIGKILL)


def _children(pid: int) -> list[int]:
    with suppress(FileNotFoundError):  # of all its threads: each has those that it started
        files = list(Path(f"/proc/{pid}/task").glob("*/children"))
        return [int(child) for file in files for child in file.read_text().split()]
    return []


FAULTS: dict[str, Fault] = {
    "SIGKILL of one rank": kill_one_rank,
    "SIGKILL of all ranks": kill_all_ranks,
    "SIGKILL while a checkpoint is written": kill_during_a_checkpoint,
    "SIGTERM to all ranks": terminate_all,
    "SIGTERM to one rank": terminate_one,
    "SIGINT": interrupt,
    "SIGTERM, then SIGKILL while it saves": terminate_then_kill,
    "newest checkpoint damaged": damage_newest_checkpoint,
    "half a line in metrics.jsonl": half_a_line,
    "exception in one rank": exception,
    "one rank exits": exit_without_a_word,
    "loss not finite": loss_not_finite,
    "out of memory": out_of_memory,
    "size of files limited": files_limited,
}
OF_LAUNCHER: dict[str, Fault] = {
    "SIGKILL of the launcher": kill_launcher,
    "SIGTERM to the launcher": terminate_launcher,
    "SIGKILL of a rank under the launcher": kill_rank_of_launcher,
}
OF_A_DISK: dict[str, Fault] = {"disk full": disk_full, "file system read-only": read_only}
