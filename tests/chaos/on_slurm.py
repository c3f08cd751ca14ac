"""The ways in which a job is broken on the test cluster: by Slurm, and by what Slurm runs on."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from runs import CASES, HERE, ROOT, SMALL, Run, forget_orders

from spd_core.run_dir import read_metrics
from spd_launch import ledger
from spd_launch.observe import observe

sys.path.insert(0, str(ROOT / "tests" / "cluster"))
import slurm_cluster
from slurm_cluster import CTL, wait_for

CONTROLLER_S = 180
USUAL_PACE_S, SLOW_PACE_S = "0.5", "6"
ON_CLUSTER = ("cluster=cpu", "cluster.partition=scavenge", "cluster.time_min=20")


@dataclass
class Scene:
    """A run that is a job; the times of its last start are Slurm's part and ours."""

    run: Run
    random: random.Random
    undo: list[Callable[[], object]] = field(default_factory=list)

    @property
    def job(self) -> str:
        return ledger.latest_jobs(self.run.launch)[self.run.run_dir.path.name]

    def shown(self, field: str) -> str:
        words = slurm("scontrol", "show", "job", "--oneliner", self.job).split(f" {field}=")
        return words[1].split()[0]

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if str(self.run.launch.path).encode() in (process / "cmdline").read_bytes():
                    env = (process / "environ").read_bytes().split(b"\0")
                    ids = [v for v in env if v.startswith(b"SLURM_PROCID=")]
                    if ids:
                        found[int(ids[0].split(b"=")[1])] = int(process.name)
        return [found[rank] for rank in sorted(found)]

    def last_line_s(self) -> float:
        records = read_metrics(self.run.run_dir)
        return float(records[-1]["time"]) if records else 0.0


def slurm(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


@contextmanager
def cluster() -> Iterator[None]:
    """The test cluster, brought up and taken down, unless SPD_KEEP_CLUSTER is 1."""
    if reason := slurm_cluster.obstacle():
        raise RuntimeError(reason)
    script, keep = slurm_cluster.__file__, os.environ.get("SPD_KEEP_CLUSTER") == "1"
    os.environ["SLURM_CONF"] = str(slurm_cluster.CONF)
    for action in ["up"] if keep else ["down", "up"]:
        slurm(sys.executable, script, action)
    try:
        yield
    finally:
        if not keep:
            slurm(sys.executable, script, "down")


def submit(case: str, out: Path) -> Run:
    """Send it, so slow that there is time to break it: a file tells each step to wait."""
    orders = out / "orders"
    orders.mkdir(parents=True)
    (orders / "pace").write_text(USUAL_PACE_S)
    where = [f"cluster.env.SPD_CHAOS='{orders}'", f"launch.out_dir='{out}'", "launch.snapshot=off"]
    command("spd_launch", *SMALL, *CASES[case], *ON_CLUSTER, *where)
    launch = ledger.find_launch("latest", out)
    task = ledger.read_tasks(launch)[0]
    return Run(case, launch, launch.run_dir(task.run_id), task.config.dp, orders)


def command(module: str, *arguments: str) -> None:
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}"}
    line = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}: {done.stdout}{done.stderr}")


# ---- what is done


def cancel(scene: Scene) -> None:
    slurm("scancel", scene.job)


def requeue(scene: Scene) -> None:
    slurm("scontrol", "requeue", scene.job)


def time_limit(scene: Scene) -> None:
    """What Slurm sends to the ranks before it."""
    slurm("scancel", "--signal=USR2", scene.job)


def preempt(_scene: Scene) -> None:
    slurm(
        "sbatch",
        "--parsable",
        "-p",
        "main",
        "-N4",
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap",
        "sleep 1",
    )


def kill_one_rank(scene: Scene) -> None:
    with suppress(ProcessLookupError):
        os.kill(scene.random.choice(scene.ranks()), signal.SIGKILL)


def kill_all_ranks(scene: Scene) -> None:
    for pid in scene.ranks():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def exception(scene: Scene) -> None:
    rank = scene.random.randrange(scene.run.dp)
    (scene.run.orders / f"order-{rank}").write_text("raise")


def lose_slurmd(scene: Scene) -> None:
    """The machine goes on, but Slurm hears nothing from it and starts the job elsewhere."""
    node = scene.shown("BatchHost")
    for pid, name in slurm_cluster.running(node).items():
        if name == "slurmd":
            os.kill(pid, signal.SIGKILL)
    scene.undo.append(lambda: slurm_cluster.start(node, "slurmd", "-D", "-N", node))
    _wait_until_lost(scene, node)


def cut_network(scene: Scene) -> None:
    node = scene.shown("BatchHost")
    link = ["ip", "-n", slurm_cluster.namespace(CTL), "link", "set", node]
    subprocess.run([*link, "down"], check=True)
    scene.undo.append(lambda: _reconnect(node))
    _wait_until_lost(scene, node)


def _reconnect(node: str) -> None:
    """Without its srun: that would end the step of the same number, which is the new attempt's."""
    for pid, name in slurm_cluster.running(node).items():
        if name == "srun":
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    link = ["ip", "-n", slurm_cluster.namespace(CTL), "link", "set", node]
    subprocess.run([*link, "up"], check=True)


def _wait_until_lost(scene: Scene, node: str) -> None:
    (scene.run.orders / "pace").write_text(SLOW_PACE_S)  # that it does not end before
    shown, attempt = ("sinfo", "-h", "-n", node, "-o", "%T"), scene.run.attempts

    def lost() -> bool:  # a node that still completes a job is not always shown as down
        return scene.run.attempts > attempt or "down" in slurm(*shown)

    try:
        wait_for(lost, 240, f"{node} to be lost")
    except TimeoutError as error:
        log = (slurm_cluster.STATE / "slurmctld.log").read_text().splitlines()[-5:]
        raise UnnoticedError(f"{error}: it is {slurm(*shown).split()}; {log}") from None
    time.sleep(15)  # what still works there ends in these seconds


def controller_down(scene: Scene) -> None:
    """It dies before the time limit's warning, and is away while the run wants to be requeued."""
    for pid, name in slurm_cluster.running(CTL).items():
        if name == "slurmctld":
            os.kill(pid, signal.SIGKILL)
    for pid in scene.ranks():
        os.kill(pid, signal.SIGUSR2)
    time.sleep(5 + 10 * scene.random.random())
    slurm_cluster.start(CTL, "slurmctld", "-D")
    wait_for(lambda: slurm_cluster.listens(CTL, 6817), CONTROLLER_S, "slurmctld")


class UnnoticedError(Exception):
    """Slurm did not see a fault in time, which is then taken back: the run was not broken."""


Fault = Callable[[Scene], None]
FAULTS: dict[str, Fault] = {
    "scancel": cancel,
    "scontrol requeue": requeue,
    "time limit (USR2)": time_limit,
    "preemption": preempt,
    "SIGKILL of one rank of a job": kill_one_rank,
    "SIGKILL of all ranks of a job": kill_all_ranks,
    "exception in one rank of a job": exception,
    "slurmd killed": lose_slurmd,
    "network of a node cut": cut_network,
    "controller down at the time limit": controller_down,
}


def strike(fault: Fault, scene: Scene) -> tuple[str, float, float]:
    """Break a run that works, and see it back: how, and the seconds to its start and to a step.

    Slurm's part is from the fault, or from `resume`, to the job's start; ours from there to the
    first new step.
    """
    run, line_s = scene.run, scene.last_line_s()
    resume_until(run, lambda: scene.last_line_s() > line_s, "a step")
    time.sleep(scene.random.random())
    attempt, began = run.attempts, time.time()
    if run.state == "finished":
        return "too late", 0, 0
    try:
        try:
            fault(scene)
        except UnnoticedError as error:
            (run.orders / "pace").write_text(USUAL_PACE_S)
            return f"too late, {error}", 0, 0
        how, began = _see_it_back(scene, attempt, began)
        started = time.mktime(time.strptime(scene.shown("StartTime"), "%Y-%m-%dT%H:%M:%S"))
        return how, max(0.0, started - began), scene.last_line_s() - started
    finally:
        for undo in scene.undo:
            undo()


def _see_it_back(scene: Scene, attempt: int, began: float) -> tuple[str, float]:
    """Wait for a step of a next attempt; how it came back, and since when."""
    run, line_s = scene.run, float("inf")

    def back() -> bool:
        nonlocal attempt, line_s
        if run.attempts > attempt:  # what was written before is of earlier attempts
            attempt, line_s = run.attempts, scene.last_line_s()
            forget_orders(run)
            (run.orders / "pace").write_text(USUAL_PACE_S)
        return scene.last_line_s() > line_s

    how, began = resume_until(run, back, "a step of the next attempt") or ("requeued", began)
    return ("finished" if run.state == "finished" else how), began


def resume_until(run: Run, reached: Callable[[], bool], what: str) -> tuple[str, float] | None:
    """Wait, or until it is finished, and `resume` where the job is over; what was, and when.

    Any time after a node was lost an srun that still works there may end the step of the same
    number elsewhere, which is the new attempt's.
    """
    deadline, resumed = time.monotonic() + 600, None
    while not reached() and run.state != "finished":
        [row] = observe(run.launch, ledger.read_rows(run.launch)[:1])
        if not row.live and row.state != "finished":
            resumed = f"{row.state}, resumed", time.time()
            forget_orders(run)
            out_dir = f"--out-dir={run.launch.path.parent.parent}"
            command("spd_launch.resume", run.launch.launch_id, out_dir)
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited for {what}: {slurm('squeue')}{slurm('sinfo')}")
        time.sleep(0.3)
    return resumed
