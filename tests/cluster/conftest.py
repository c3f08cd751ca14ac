"""The four-node Slurm of slurm_cluster.py as a fixture.

CI                  set: a machine that cannot run the cluster fails these tests, not skips them
SPD_KEEP_CLUSTER    1: use a cluster that is already up, and leave it up at the end
SPD_SLURM_DIR       where the cluster keeps its state
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from cluster import LOSS, NO_FIGURES, SLOW, SMALL, Cluster, Command, Launch

from spd_launch import ledger
from spd_launch.ledger import LaunchDir
from spd_launch.plan import Task

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SESSION_LOCK = Path(f"/run/{slurm_cluster.LOGIN_LINK}-session.lock")
UP_S = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # those of the whole session, not of this folder alone
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)


def slurm_cluster_py(*args: str) -> None:
    script = [sys.executable, str(HERE / "slurm_cluster.py"), *args]
    done = subprocess.run(script, capture_output=True, text=True, timeout=UP_S)
    if done.returncode != 0:
        pytest.fail(f"slurm_cluster.py {' '.join(args)}: {done.stdout}{done.stderr}")


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    if reason := slurm_cluster.obstacle():
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    keep = os.environ.get("SPD_KEEP_CLUSTER") == "1"
    # Test processes that would share a cluster take turns: those of two sessions.
    with SESSION_LOCK.open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("SLURM_CONF", str(slurm_cluster.CONF))
        if not keep:
            slurm_cluster_py("down")
        slurm_cluster_py("up")
        yield Cluster(slurm_cluster.CONF, slurm_cluster.NODES)
        if not keep:
            slurm_cluster_py("down")


@pytest.fixture(autouse=True)
def _tidy(slurm: Cluster) -> Iterator[None]:
    """What a test started has ended before the next one looks at the queue, or needs four nodes."""
    yield
    slurm.tidy()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working tree as a repository of its own, in a path with a space."""
    project = tmp_path_factory.mktemp("project") / "my spd"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, project / name)
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    return project


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of results for all tests of a file."""
    return tmp_path_factory.mktemp("results") / "out"


@pytest.fixture(scope="session")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target of SMALL, trained once; targets as jobs have their own test file."""
    out = tmp_path_factory.mktemp("target")
    here = ["cluster=local", "launch.goal=target", "launch.snapshot=off", f"launch.out_dir={out}"]
    line = [sys.executable, "-m", "spd_launch", *SMALL, *here]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "targets"


@pytest.fixture(scope="module")
def target(targets: Path, out: Path) -> None:
    """For the tests of a file that decompose it."""
    shutil.copytree(targets, out / "targets")


@pytest.fixture(scope="module")
def command(slurm: Cluster, project: Path, out: Path) -> Command:
    ours = {"SPD_OUT_DIR": out, "PYTHONPATH": project, "SLURM_CONF": slurm.conf}
    env = {**os.environ, **{name: str(path) for name, path in ours.items()}}

    def run(
        module: str, *arguments: str, code: int = 0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(
            line, cwd=project, env=env | variables, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def launch(command: Command, out: Path) -> Launch:
    def run(*arguments: str) -> tuple[LaunchDir, list[Task]]:
        command("spd_launch", *SMALL, *NO_FIGURES, *arguments)
        folder = ledger.find_launch("latest", out)
        return folder, ledger.read_tasks(folder)

    return run


@pytest.fixture
def go(project: Path, tmp_path: Path) -> Path:
    """The file that a run of seed 1 waits for, or fails without: see `until`."""
    (project / "stubborn.py").write_text(LOSS)
    return tmp_path / "go"


@pytest.fixture
def slow(project: Path, go: Path) -> list[str]:
    """Overrides for a run that takes minutes, until `go` exists, and then seconds."""
    (project / "slow.py").write_text(SLOW)
    steps = ["train.steps=150", "eval.every=75", "eval.slow_every=150", "checkpoint.every_steps=5"]
    return [*steps, f"losses.slow={{path: slow.loss, coeff: 1.0, until: '{go}'}}"]
