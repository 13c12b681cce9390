#!/usr/bin/env bash
# Installs into .venv what is missing, then checks style and types and runs the whole suite.
# Arguments go to pytest: bash scripts/test.sh tests/core
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh dev
bash scripts/setup_slurm.sh  # says what it skips, and why
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
