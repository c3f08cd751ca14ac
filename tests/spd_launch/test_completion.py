"""What a word may go on with, and that bash and zsh ask for it and show it."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_command import ROOT

from spd_launch.completion import SCRIPTS, candidates


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("+experiment=tms_40", ["+experiment=tms_40-10", "+experiment=tms_40-10-id"]),
        ("experiment=ih,resid_mlp1", ["experiment=ih,resid_mlp1"]),
        ("cluster=l", ["cluster=local"]),
        ("+sweep=tms_s", ["+sweep=tms_sparsity"]),
        ("size=", ["size=full", "size=small"]),
        ("see", ["seed="]),
        ("+swe", ["+sweep="]),
        ("cluster", ["cluster.", "cluster="]),
        ("train.lr.s", ["train.lr.start="]),
        ("decompose.mo", ["decompose.modules="]),
        ("losses.faithfulness", ["losses.faithfulness.", "losses.faithfulness="]),
        ("losses.pgd_recon.ini", ["losses.pgd_recon.init="]),
        ("losses.pgd_recon.init=r", ["losses.pgd_recon.init=random"]),
        ("launch.wait=", ["launch.wait=false", "launch.wait=true"]),
        ("launch.if_done=s", ["launch.if_done=skip"]),
        ("eval.metrics.uv_plots=", ["eval.metrics.uv_plots=null"]),
        ("--comp", ["--completion"]),
        ("train.nothing.", []),
        ("nothing=", []),
    ],
)
def test_candidates(word: str, expected: list[str]) -> None:
    assert candidates(word) == expected


BASHRC = "{script}\nPS1='$ '\nbind 'set bell-style none'\n"
ZSHRC = "autoload -Uz compinit\ncompinit -u -D\n{script}\nPS1='$ '\n"
START = {"bash": ("rc", BASHRC, "--noprofile --rcfile {rc} -i"), "zsh": (".zshrc", ZSHRC, "-d -i")}


@pytest.fixture(params=START)
def interactive(request: pytest.FixtureRequest, tmp_path: Path):
    """Types into an interactive shell of ours, and returns what it shows in the end."""
    shell: str = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    (tmp_path / "launches" / "20261124-101530-tms_5-2-08b3").mkdir(parents=True)
    file, start, options = START[shell]
    (tmp_path / file).write_text(start.format(script=SCRIPTS[shell]))
    env = {**os.environ, "SPD_OUT_DIR": str(tmp_path), "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "ZDOTDIR": str(tmp_path)}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execvpe(shell, [shell, *options.format(rc=tmp_path / file).split()], env)

    def show(typed: str, wanted: str) -> str:
        shown, deadline, again = "", time.monotonic() + 60, 0.0
        while wanted not in shown and time.monotonic() < deadline:
            if time.monotonic() > again:  # what is typed before the first prompt may be lost
                os.write(terminal, f"\x15{typed}\t".encode())
                again = time.monotonic() + 10
            if select.select([terminal], [], [], 0.2)[0]:
                shown += os.read(terminal, 65536).decode(errors="replace")
        return shown

    yield show
    os.write(terminal, b"\x15exit\n")
    os.close(terminal)
    os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("python -m spd_launch +experiment=ss_gpt2_simple_", "ss_gpt2_simple_noln"),
        ("python -m spd_launch +experiment=ih cluster=pre", "cluster=preemptible"),
        ("python -m spd_launch -m +experiment=ih,resid_mlp3 train.lr.sta", "train.lr.start="),
        ("python -m spd_launch.status 2026", "20261124-101530-tms_5-2-08b3"),
        ("python pyproj", "pyproject.toml"),
    ],
)
def test_the_shell_completes_the_word(interactive, typed: str, wanted: str) -> None:
    assert wanted in interactive(typed, wanted)


def test_the_scripts_are_what_the_command_prints() -> None:
    for shell, script in SCRIPTS.items():
        command = [sys.executable, "-m", "spd_launch", "--completion", shell]
        assert subprocess.check_output(command, cwd=ROOT, text=True) == script + "\n"
