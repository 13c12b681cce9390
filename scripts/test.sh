#!/usr/bin/env bash
# Installs into .venv what is missing, then checks style and types and runs the whole suite.
# Arguments go to pytest: bash scripts/test.sh tests/core; with -n 0 all runs in one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh dev
bash scripts/setup_debian.sh  # says what it skips, and why
ruff check .
ruff format --check .
mypy
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the models are tiny, and two files run at a time
# A file stays in one process, for its fixtures (the one SLURM among them); tests/conftest.py says which come first.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
