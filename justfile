# `just` lists what can be done here; every recipe sets up the virtual environment it needs.
set shell := ["bash", "-euo", "pipefail", "-c"]
set positional-arguments

python := env("SPD_PYTHON", "python3")
bin := ".venv/bin"

# List the recipes
default:
    @just --list

# Install into .venv (once; again when pyproject.toml or constraints.txt change)
install:
    @if [ ! -f .venv/installed ] || [ pyproject.toml -nt .venv/installed ] || [ constraints.txt -nt .venv/installed ]; then \
        "{{python}}" -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; set SPD_PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else 0' && \
        "{{python}}" -m venv .venv && \
        {{bin}}/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==$(sed -n 's/^torch==//p' constraints.txt)" && \
        {{bin}}/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' && \
        touch .venv/installed; \
    fi

# Decompose a toy model here, from nothing to a report, in a few minutes
demo *overrides: install
    {{bin}}/python -m spd_launch +experiment=tms_5-2 cluster=local "$@"

# All tests (the cluster tests need root and Debian's Slurm packages, and skip elsewhere)
test: install
    # Real processes and jobs share the cores with other tests: who runs out of time has a second try, which is shown.
    {{bin}}/python -m pytest -n 2 --reruns 1 -m "not cluster"
    {{bin}}/python -m pytest -n 3 --dist worksteal --reruns 1 tests/cluster

# The tests that take seconds
test-fast *args: install
    {{bin}}/python -m pytest -n 2 -m "not slow and not cluster" "$@"

# The tests on real four-node Slurm clusters on this machine: one each for three processes, which mostly wait
test-cluster *args: install
    {{bin}}/python -m pytest -n 3 --dist worksteal -m cluster "$@"

# Break small runs in every way, continue them and compare: --faults 200, --where cluster, ...
chaos *args: install
    {{bin}}/python tests/chaos/chaos.py "$@"

# Bring the four-node test cluster up, or take it down
cluster action="up": install
    {{bin}}/python tests/cluster/slurm_cluster.py {{action}}

# Check style without changing anything
lint: install
    {{bin}}/ruff check .
    {{bin}}/ruff format --check .

# Rewrite to the house style
format: install
    {{bin}}/ruff check --fix .
    {{bin}}/ruff format .

# Check types
types: install
    {{bin}}/basedpyright

# What CI checks before the tests
check: lint types

# The lines of each file of the training core, and of all (at most 3,000), without what makes it fast
lines:
    @find spd_core -name '*.py' -not -path '*/targets/*' -not -path '*/data/*' -not -path '*/fast/*' | sort | xargs wc -l

# Time the steps of four experiments against the plain formulas, and against the last time
bench *args: install
    {{bin}}/python -m benchmarks.table "$@"

# Redraw the picture of docs/ from a real run
docs run: install
    {{bin}}/python docs/draw_introduction.py "{{run}}"

# Write docs/gallery.md and its pictures from the folders of finished runs
gallery +runs: install
    {{bin}}/python -m spd_analysis.gallery "$@"

# Install the pre-commit hooks
hooks: install
    {{bin}}/pre-commit install
