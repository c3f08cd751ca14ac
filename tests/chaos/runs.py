"""Small runs of every kind, started as real processes, and what one run must share with another."""

import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path

from spd_core.run_dir import RunDir, read_metrics
from spd_launch.compose import compose
from spd_launch.freeze import record
from spd_launch.ledger import LaunchDir, new_launch, note_jobs, read_rows
from spd_launch.observe import observe
from spd_launch.run_record import read_status
from spd_launch.snapshot import Snapshot
from spd_launch.task import STOPPED
from spd_launch.validate import validate

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SMALL = (
    "cluster=local", "train.device=cpu", "train.steps=24", "train.batch_size=32",
    "train.faithfulness_warmup.steps=3", "eval.every=8", "eval.slow_every=24", "eval.steps=1",
    "eval.batch_size=32", "checkpoint.every_steps=3", "track.log_every=1",
    "losses.exploding={path: exploding.loss, coeff: 1.0, nan_at: []}",
)  # fmt: skip
TMS = (
    "+experiment=tms_5-2", "target.steps=150", "target.batch_size=256",
    "target.lr={kind:constant,start:3e-2,end:3e-2,warmup_fraction:0.0}",
    "decompose.modules={linear1:6,linear2:6}", "decompose.ci_fn.hidden=[3]",
)  # fmt: skip
PGD = "coeff:0.5,init:random,step_size:0.2,n_steps:2"
SUBSET = "routing:{kind:uniform_k_subset}"
EVERY_LOSS = (
    "losses.faithfulness.coeff=1.0",
    "losses.unmasked_recon.coeff=0.1",
    "losses.ci_masked_recon.coeff=0.1",
    f"losses.ci_masked_recon_subset={{coeff:0.1,{SUBSET}}}",
    "losses.ci_masked_recon_layerwise.coeff=0.1",
    f"losses.stochastic_recon_subset={{coeff:0.1,{SUBSET}}}",
    f"losses.pgd_recon={{{PGD},scope:shared_across_batch}}",
    f"losses.pgd_recon_subset={{{PGD},scope:unique_per_datapoint,{SUBSET}}}",
    "losses.stochastic_hidden_acts_recon.coeff=0.1",
)
NO_FIGURES = tuple(
    f"eval.metrics.{name}=null"
    for name in ("ci_histograms", "component_activation_density", "ci_mean_per_component",
                 "permuted_ci_plots", "uv_plots")
)  # fmt: skip
ONE_FIGURE = tuple(override for override in NO_FIGURES if "ci_mean_per_component" not in override)
TEXT = (
    "+experiment=ss_gpt2_simple-1L", "data=stories", "size=small", "data.n_documents=300",
    "data.vocab_size=300", "data.seq_len=16", "target.d_model=16", "target.d_mlp=16",
    "target.batch_size=4", "target.steps=60", "decompose.ci_fn.hidden=[8]", "train.steps=12",
    "train.batch_size=8", "eval.every=12", "eval.slow_every=12", "eval.batch_size=8",
)  # fmt: skip
# Of one step once, of another three times: its batch, and those drawn instead (24 steps on).
REWINDS = ("train.on_nan=rewind", "losses.exploding.nan_at=[7, 14, 38, 62]")
CASES: dict[str, tuple[str, ...]] = {
    "tms with figures": (*TMS, *ONE_FIGURE, "eval.slow_every=8"),
    "every loss, 2 ranks": (*TMS, *NO_FIGURES, *EVERY_LOSS, "dp=2"),
    "binomial, microbatches": (
        *TMS, *NO_FIGURES, *EVERY_LOSS, "decompose.sampling=binomial", "train.microbatch_size=16",
        "+eval.metrics.alive_components={when:fast,threshold:0.1,n_examples:200}",
    ),
    "alive components, 2 ranks": (
        *TMS, *NO_FIGURES, "dp=2",
        "+eval.metrics.alive_components={when:fast,threshold:0.1,n_examples:200}",
    ),
    "rewinds, 2 ranks": (*TMS, *NO_FIGURES, *REWINDS, "dp=2"),
    "language model and its target, 2 ranks": (*TEXT, *NO_FIGURES, "dp=2"),
}  # fmt: skip
TIMED = ("time", "examples_per_s", "tokens_per_s", "eval_cost/", "checkpoint_cost_s")


@dataclass
class Run:
    """One run in a folder of outputs of its own, worked on by `ranks` or a launcher at times."""

    case: str
    launch: LaunchDir
    run_dir: RunDir
    dp: int
    orders: Path  # where `exploding` looks for what to do
    ranks: list[multiprocessing.Process] = field(default_factory=list)
    launcher: subprocess.Popen[bytes] | None = None
    attempt: int = 0

    @property
    def state(self) -> str:
        status = read_status(self.run_dir)
        assert status is not None
        return status.state

    @property
    def attempts(self) -> int:
        status = read_status(self.run_dir)
        assert status is not None
        return status.attempt

    @property
    def works(self) -> bool:
        if self.launcher is not None:
            return self.launcher.poll() is None
        return all(rank.is_alive() for rank in self.ranks)

    @property
    def log(self) -> Path:
        return self.orders / "log.txt"


def make_run(case: str, out: Path, *overrides: str) -> Run:
    """Launched as far as can be without starting it."""
    typed = [*SMALL, *CASES[case], f"launch.out_dir='{out}'", *overrides]
    [composed] = compose(typed, multirun=False)
    plan, launch = new_launch([(composed.overrides, validate(composed.values))])
    record(launch, plan, Snapshot(ROOT, None, None), [])
    [task] = plan.tasks
    run_dir = launch.run_dir(task.run_id)
    return Run(case, launch, run_dir, task.config.dp, orders=run_dir.path)


def prepare() -> None:
    """One process has everything imported, and is what the ranks are forked from."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(HERE))
    modules = ["torch", "torch._dynamo", "spd_core.train", "spd_launch.task", "spd_launch.peers",
               "spd_analysis.report", "spd_core.metrics.figures", "tokenizers"]  # fmt: skip
    context().set_forkserver_preload(modules)


def context() -> multiprocessing.context.ForkServerContext:
    return multiprocessing.get_context("forkserver")


def start(run: Run) -> None:
    """Start all ranks, as the launcher does, or as Slurm does after a requeue."""
    forget_orders(run)
    run.attempt += 1
    note_jobs(run.launch, "local", {run.run_dir.path.name: f"local-chaos-{run.attempt}"})
    ranks = [context().Process(target=_rank, args=(rank, run)) for rank in range(run.dp)]
    for rank in ranks:
        rank.start()
    run.ranks = ranks


def start_launcher(run: Run) -> None:
    """Start them as a user does."""
    forget_orders(run)
    out_dir = f"--out-dir={run.launch.path.parent.parent}"
    resume = [sys.executable, "-m", "spd_launch.resume", run.launch.launch_id, out_dir]
    paths = {"PYTHONPATH": f"{ROOT}:{HERE}", "SPD_CHAOS": str(run.orders)}
    with open(run.log, "ab") as log:
        run.launcher = subprocess.Popen(
            resume, env=os.environ | paths, stdout=log, stderr=log, cwd=ROOT
        )


def forget_orders(run: Run) -> None:
    for order in run.orders.glob("order-*"):
        order.unlink()


def _rank(rank: int, run: Run) -> None:
    from spd_launch import task

    descriptor = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(run.dp)}
    os.environ |= {"SPD_JOB_ID": f"local-chaos-{run.attempt}", "SPD_CHAOS": str(run.orders)}
    sys.argv = ["task", str(run.launch.path), run.run_dir.path.name]
    sys.exit(task.main())


def wait(run: Run, grace_s: float = 5, timeout_s: float = 300) -> list[int]:
    """The exit code of every rank; minus a signal's number where one was killed by it.

    Where one fails the others have a few seconds to end, and are killed then: Slurm and the
    launcher do so.
    """
    if run.launcher is not None:
        code, run.launcher = run.launcher.wait(timeout_s), None
        return [code]
    deadline = time.monotonic() + timeout_s
    while any(rank.is_alive() for rank in run.ranks) and time.monotonic() < deadline:
        if any(rank.exitcode not in (None, 0, STOPPED) for rank in run.ranks):
            deadline = min(deadline, time.monotonic() + grace_s)
        connection.wait([r.sentinel for r in run.ranks if r.is_alive()], timeout=0.5)
    stuck = [i for i, rank in enumerate(run.ranks) if rank.is_alive()]
    for rank in run.ranks:
        rank.kill()
        rank.join()
    codes = [rank.exitcode for rank in run.ranks if rank.exitcode is not None]
    run.ranks = []
    if stuck and not any(codes[i] not in (0, STOPPED) for i in range(run.dp) if i not in stuck):
        raise TimeoutError(f"ranks {stuck} of {run.case!r} did not end within {timeout_s:g} s")
    return codes


def shown(run: Run, codes: list[int]) -> str:
    """What `status` calls a run whose processes ended with these codes; fails where it is wrong."""
    [row] = observe(run.launch, read_rows(run.launch)[:1])
    assert not row.live, "nothing works on it any more"
    last_step = int(records[-1]["step"]) if (records := read_metrics(run.run_dir)) else 0
    saved_step = steps[-1] if (steps := steps_saved(run)) else 0
    match row.state:
        case "finished":
            right = saved_step == last_step == row.status.steps
        case "stopped":  # with nothing lost
            right = saved_step == last_step and set(codes) != {0}
        case "failed" | "ended, not finished":
            right = set(codes) not in ({0}, {STOPPED})
        case "not sent":  # its launcher was ended before it had begun
            right = last_step == 0 and codes[0] < 0
        case _:
            right = False
    assert right, f"{codes}, {saved_step} steps saved, {last_step} reported: {row.state}"
    return row.state


def differences(run: Run, whole: Run) -> list[str]:
    """What a run that was broken and continued has otherwise than one that was left alone."""
    found = []
    one, other = (_metrics(r) for r in (run, whole))
    if one != other:
        steps = ([r["step"] for r in records] for records in (one, other))
        found.append(f"metrics.jsonl: steps {' and '.join(map(str, steps))}, or their values")
    one, other = (_files(r) for r in (run, whole))
    found += [f"{name} is on one side only" for name in sorted(one.keys() ^ other.keys())]
    found += [
        f"{name} differs" for name in sorted(one.keys() & other.keys()) if one[name] != other[name]
    ]
    return found


def _metrics(run: Run) -> list[dict[str, float | int | str]]:
    return [
        {key: value for key, value in record.items() if not key.startswith(TIMED)}
        for record in read_metrics(run.run_dir)
    ]


def _files(run: Run) -> dict[str, bytes]:
    """Checkpoints, rewinds, figures, target and corpus, every byte; and that there is a report."""
    rewinds = run.run_dir.rewinds_file
    kept = {rewinds.name: rewinds.read_bytes()} if rewinds.exists() else {}
    of_run = run.run_dir
    for folder in (of_run.checkpoints, of_run.figures, of_run.targets, of_run.data):
        for file in folder.rglob("*"):
            place = file.relative_to(folder.parent)
            litter = any(part.startswith((".", "damaged_")) for part in place.parts)
            if file.is_file() and not litter and file.suffix != ".lock":
                kept[str(place)] = file.read_bytes()
    assert run.run_dir.report_file.exists(), "no report"
    return kept


def steps_saved(run: Run) -> list[int]:
    names = [p.name for p in run.run_dir.checkpoints.glob("step_*")]
    return sorted(int(name.removeprefix("step_")) for name in names)
