"""What may import what, how long a file may be, and which word is never used."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
PACKAGES = ("spd_core", "spd_analysis", "spd_launch")
FILES = [f for p in PACKAGES for f in sorted((REPO / p).rglob("*.py"))]
FORBIDDEN = {
    "spd_core": {"spd_launch", "spd_analysis", "hydra", "omegaconf", "submitit"},
    "spd_analysis": {"spd_launch", "hydra", "omegaconf", "submitit"},
    "spd_launch": set(),
}
LAZY = {"wandb", "transformers", "datasets", "matplotlib"}


def imports(nodes: list[ast.AST]) -> set[str]:
    """Top-level packages that these statements import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add((node.module or "").split(".")[0])
    return found


def name(file: Path) -> str:
    return str(file.relative_to(REPO))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_go_one_way(file):
    tree = ast.parse(file.read_text())
    package = file.relative_to(REPO).parts[0]
    assert not imports(list(ast.walk(tree))) & FORBIDDEN[package]
    allowed = {"matplotlib"} if name(file) == "spd_core/metrics/figures.py" else set()
    assert not (imports(list(tree.body)) & LAZY) - allowed


def test_planning_does_not_load_torch():
    code = "import sys, spd_core.run_dir, spd_launch.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


@pytest.mark.parametrize("file", FILES, ids=name)
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= 400


def test_the_core_can_be_read_in_an_afternoon():
    """All but targets, data and fast, comments and docstrings included; `just lines` counts."""
    apart = [REPO / "spd_core" / room for room in ("targets", "data", "fast")]
    files = [f for f in FILES if f.is_relative_to(REPO / "spd_core") and f.parent not in apart]
    lines = {name(f): len(f.read_text().splitlines()) for f in files}
    assert sum(lines.values()) <= 3000, lines


def test_the_word_for_ci_fn_is_ci_fn():
    files = [f for p in PACKAGES for f in (REPO / p).rglob("*") if f.suffix in (".py", ".yaml")]
    pattern = re.compile(r"(?<![a-z])gat(e|es|ed|ing)(?![a-z]|_proj)", re.IGNORECASE)
    assert [name(f) for f in files if pattern.search(f.read_text())] == []
