"""Break small runs in every way a machine or a cluster does, continue them, and compare.

    python tests/chaos/chaos.py --faults 200                    on this machine
    python tests/chaos/chaos.py --where cluster --minutes 20    on the four-node test cluster

A run is broken a few times at random moments, continued after each, and at the end compared with
the same run left alone: metrics (without times), checkpoints, figures and target, bit for bit.
The seed decides what is broken when; how far a run is at that moment is the machine's to say.
"""

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from disk import Disk
from faults import FAULTS, OF_A_DISK, Fault, Scene
from rich.console import Console
from rich.table import Table
from runs import CASES, Run, differences, make_run, prepare, start, wait

PER_RUN = 8
console = Console(width=110)


@dataclass
class Record:
    """What was broken, and what came of it."""

    faults: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    identical: int = 0
    problems: list[str] = field(default_factory=list)
    to_first_step_s: list[float] = field(default_factory=list)

    def show(self) -> None:
        table = Table(
            "what was done to a run", "times", "of runs that were lost", title_justify="left"
        )
        for name, count in sorted(self.faults.items()):
            table.add_row(name, str(count), str(self.lost[name]))
        table.add_section()
        table.add_row("all", str(self.faults.total()), "")
        console.print(table)
        console.print(
            f"{self.runs} runs, {self.identical} of them bit-identical to the same run left alone"
        )
        if self.to_first_step_s:
            median = statistics.median(self.to_first_step_s)
            console.print(f"from a start to the first new step: {median:.1f} s (median)")
        for problem in self.problems:
            console.print(f"[red]{problem}", soft_wrap=True)


def here(options: argparse.Namespace, place: Path) -> Record:
    prepare()
    record, chance, disk = Record(), random.Random(options.seed), Disk(place)
    faults = FAULTS | (OF_A_DISK if disk.real else {})
    whole: dict[str, Run] = {}
    deadline = time.monotonic() + options.minutes * 60
    kinds: list[str] = []
    try:
        while record.faults.total() < options.faults and time.monotonic() < deadline:
            case = options.case or chance.choice(list(CASES))
            if case not in whole:
                whole[case] = left_alone(case, place / "whole" / str(len(whole)))
            if len(kinds) < PER_RUN:
                kinds += chance.sample(list(faults), len(faults))
            chosen, kinds = kinds[:PER_RUN], kinds[PER_RUN:]
            torment(record, case, [(n, faults[n]) for n in chosen], disk, chance, whole[case])
    finally:
        disk.close()
    return record


def left_alone(case: str, out: Path) -> Run:
    run = make_run(case, out)
    start(run)
    codes = wait(run, timeout_s=600)
    assert run.state == "finished" and not any(codes), run.log.read_text()
    return run


def torment(record, case, faults, disk, chance, whole) -> None:
    """One run: broken once per fault, and continued until it is finished."""
    record.runs += 1
    out = disk.path / f"run{record.runs}"
    run = make_run(case, out)
    told = []
    try:
        for name, fault in faults:
            told.append(f"{name}: {strike(fault, Scene(run, disk, chance))} {run.state}")
            if run.state == "finished":
                break
            record.faults[name] += 1
        for _ in range(2):  # the second finds nothing to do, but perhaps a report
            start(run)
            told.append(f"left alone: {wait(run)} {run.state}")
        problems = differences(run, whole)
    except (AssertionError, TimeoutError, RuntimeError, OSError) as error:
        problems = [f"{type(error).__name__}: {error}"]
    if not problems:
        record.identical += 1
        shutil.rmtree(out)
    else:
        record.lost.update(name for name, _ in faults)
        kept = Path(tempfile.mkdtemp(prefix="chaos-")) / case.replace(" ", "_")
        shutil.copytree(out, kept)
        record.problems.append(f"{case}: {'; '.join(problems)}; after {told}; kept in {kept}")
        console.print(f"[red]{record.problems[-1]}", soft_wrap=True)
    console.print(
        f"{record.faults.total():4} faults, {record.runs} runs  {case}: {'; '.join(told)}",
        soft_wrap=True,
    )


def strike(fault: Fault, scene: Scene) -> list[int]:
    """Let a run work until the fault ends it; returns the exit codes."""
    start(scene.run)
    try:
        fault(scene)
        return wait(scene.run)
    finally:
        for rank in scene.run.ranks:
            rank.kill()
        for undo in scene.undo:
            undo()
        scene.disk.mend()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--where", choices=["local", "cluster"], default="local")
    parser.add_argument("--faults", type=int, default=10**9, help="stop after so many")
    parser.add_argument("--minutes", type=float, default=5.0, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", choices=list(CASES), help="default: all of them by chance")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="spd-chaos-", dir="/dev/shm"))
    try:
        record = here(options, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    record.show()
    return 1 if record.problems else 0


if __name__ == "__main__":
    sys.exit(main())
