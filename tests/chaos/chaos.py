"""Break small runs in every way a machine or a cluster does, continue them, and compare.

    python tests/chaos/chaos.py --faults 200 --minutes 60       on this machine
    python tests/chaos/chaos.py --where cluster --minutes 20    on the four-node test cluster

A run is broken a few times at random moments, continued after each, and at the end compared with
the same run left alone: metrics (without times), checkpoints, figures and target, bit for bit.
The seed decides what is broken when; how far a run is at that moment is the machine's to say.
"""

import argparse
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path

from disk import Disk
from faults import FAULTS, OF_A_DISK, OF_LAUNCHER, Fault, Scene
from rich.console import Console
from rich.table import Table
from runs import CASES, Run, differences, make_run, prepare, shown, start, start_launcher, wait

from spd_core.run_dir import read_metrics

PER_RUN, PER_JOB = 8, 5
FEW_CASES = list(CASES)[:1] + list(CASES)[-2:]  # jobs take long enough
console = Console(width=110)


@dataclass
class Record:
    """What was broken, and what came of it."""

    faults: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    identical: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def show(self) -> None:
        table = Table("what was done to a run", "times", "of runs that were lost")
        for name, count in sorted(self.faults.items()):
            table.add_row(name, str(count), str(self.lost[name]))
        table.add_section()
        table.add_row("all", str(self.faults.total()), str(self.lost.total()))
        console.print(table)
        console.print(
            f"{self.runs} runs; bit-identical to the same run left alone: {self.identical}"
        )
        for name, values in self.seconds.items():
            middle, most = statistics.median(values), max(values)
            console.print(f"{name}: {middle:.1f} s, at most {most:.1f} s ({len(values)} times)")
        for problem in self.problems:
            console.print(f"[red]{problem}", soft_wrap=True)


def endless(chance: random.Random, names: Iterable[str]) -> Iterator[str]:
    """Each of them once, then each of them again, always in another order."""
    names = sorted(names)
    while True:
        yield from chance.sample(names, len(names))


def here(options: argparse.Namespace, place: Path, record: Record) -> None:
    chance, disk = random.Random(options.seed), Disk(place)
    faults = FAULTS | OF_LAUNCHER | (OF_A_DISK if disk.real else {})
    kinds, cases = endless(chance, faults), endless(chance, options.case or CASES)

    def torment(run: Run) -> Iterator[tuple[str, str]]:
        for name in islice(kinds, PER_RUN):
            codes = strike_here(faults[name], Scene(run, disk, chance))
            yield name, f"{codes} {shown(run, codes)}"
            if run.state == "finished":
                break
        for _ in range(2):  # the second finds nothing to do, but perhaps a report
            began = time.time()
            start(run)
            yield "left alone", f"{(codes := wait(run))} {shown(run, codes)}"
            new = [float(r["time"]) - began for r in read_metrics(run.run_dir)]
            if new and new[-1] > 0:
                first_s = min(s for s in new if s > 0)
                record.seconds["from a start to the first new step"].append(first_s)

    try:
        for case in until_enough(options, record, cases):
            whole = left_alone(case, place)
            out = disk.path / f"run{record.runs}"
            judge(record, make_run(case, out), torment, whole)
            shutil.rmtree(out)
    finally:
        disk.close()


def on_cluster(options: argparse.Namespace, place: Path, record: Record) -> None:
    import on_slurm

    chance = random.Random(options.seed)
    kinds, cases = endless(chance, on_slurm.FAULTS), endless(chance, options.case or FEW_CASES)

    def torment(run: Run) -> Iterator[tuple[str, str]]:
        for name in islice(kinds, min(PER_JOB, options.faults)):
            how, slurms, ours = on_slurm.strike(on_slurm.FAULTS[name], on_slurm.Scene(run, chance))
            told = f"{how}, {slurms:.0f} s to its start and {ours:.0f} s to a step"
            yield ("left alone" if how.startswith("too late") else name), f"{name}: {told}"
            if run.state == "finished":
                break
            if how.startswith("too late"):
                continue
            way = how.split(", ")[-1]  # requeued, or resumed by hand
            record.seconds[f"{way}, Slurm's part: to the start of the job"].append(slurms)
            record.seconds[f"{way}, ours: from there to the first new step"].append(ours)
        (run.orders / "pace").unlink()  # no more waiting
        on_slurm.resume_until(run, lambda: False, "its end")
        on_slurm.wait_for(run.run_dir.report_file.exists, 300, "its report")

    with on_slurm.cluster():
        for case in until_enough(options, record, cases):
            whole = left_alone_after_target(case, place)
            judge(record, on_slurm.submit(case, place / f"run{record.runs}"), torment, whole)


def until_enough(
    options: argparse.Namespace, record: Record, cases: Iterator[str]
) -> Iterator[str]:
    deadline = time.monotonic() + options.minutes * 60
    while record.faults.total() < options.faults and time.monotonic() < deadline:
        record.runs += 1
        yield next(cases)


@cache
def left_alone(case: str, place: Path) -> Run:
    return _left_alone(case, place / "whole" / case.replace(" ", "_"))


@cache
def left_alone_after_target(case: str, place: Path) -> Run:
    """As on a cluster, where a job before it trains the target, on as many processes."""
    out = place / "whole" / case.replace(" ", "_")
    _left_alone(case, out, "launch.goal=target")
    return _left_alone(case, out)


def _left_alone(case: str, out: Path, *overrides: str) -> Run:
    run = make_run(case, out, *overrides)
    start(run)
    codes = wait(run, timeout_s=600)
    assert run.state == "finished" and not any(codes), run.log.read_text()
    return run


def judge(
    record: Record, run: Run, torment: Callable[[Run], Iterator[tuple[str, str]]], whole: Run
) -> None:
    """One run: broken once per fault, continued until it is finished, and compared."""
    told: list[str] = []
    faults: Counter[str] = Counter()
    try:
        for name, what in torment(run):
            told.append(f"{name}: {what}")
            console.print(f"  {told[-1]}", soft_wrap=True)
            faults[name] += name != "left alone" and run.state != "finished"
        problems = differences(run, whole)
    except (AssertionError, TimeoutError, RuntimeError, OSError) as error:
        problems = [f"{type(error).__name__}: {error}"]
    record.faults += faults
    record.identical += not problems
    if problems:
        record.lost += faults
        kept = Path(tempfile.mkdtemp(prefix="spd-chaos-lost-")) / "out"
        shutil.copytree(run.launch.path.parent.parent, kept)
        record.problems.append(f"{run.case}: {'; '.join(problems)}; after {told}; kept in {kept}")
        console.print(f"[red]{record.problems[-1]}", soft_wrap=True)
    console.print(f"{record.faults.total()} faults, {record.runs} runs: {run.case}", soft_wrap=True)


def strike_here(fault: Fault, scene: Scene) -> list[int]:
    """Let a run work until the fault ends it; returns the exit codes."""
    (start_launcher if fault in OF_LAUNCHER.values() else start)(scene.run)
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
    parser.add_argument("--case", nargs="*", choices=list(CASES), help="default: all in turn")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the disk is unmounted then, too
    place, record = Path(tempfile.mkdtemp(prefix="spd-chaos-", dir="/dev/shm")), Record()
    prepare()
    try:
        {"local": here, "cluster": on_cluster}[options.where](options, place, record)
    except KeyboardInterrupt:
        console.print("interrupted")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    record.show()
    return 1 if record.problems or not record.faults else 0


if __name__ == "__main__":
    sys.exit(main())
