#!/usr/bin/env bash
# Installs into .venv what is missing, then checks style and types and runs the whole test suite.
# Arguments go to pytest: bash scripts/test.sh tests/core. With -n 0 everything runs in one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh dev
bash scripts/setup_debian.sh  # SLURM and a browser for the tests that need them; names what it cannot install
ruff check .
ruff format --check .
mypy
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the models are tiny, and two files run at a time
# All tests of a file run in one process, because they share fixtures (such as one SLURM); tests/conftest.py sorts files.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
