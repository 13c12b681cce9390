#!/usr/bin/env bash
# Makes .venv in the checkout with the packages of pyproject.toml and the extras in $1, or keeps it if nothing has changed.
# demo.sh and test.sh source it; it sets $VENV and puts the environment's programs on $PATH.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
EXTRAS="$1"
# The stamp is written when the installation is complete, and names the extras and the state of pyproject.toml.
STAMP="$EXTRAS $(cksum < "$ROOT/pyproject.toml")"
if [ "$(cat "$VENV/.ov2-stamp-$EXTRAS" 2>/dev/null)" != "$STAMP" ]; then
  PYTHON=""
  for candidate in python3 python3.12 python3.11 python3.13 python3.10; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      PYTHON="$candidate"; break
    fi
  done
  [ -n "$PYTHON" ] || { echo "setup: needs Python 3.10 to 3.13 with venv (Debian: apt-get install python3-venv)" >&2; exit 1; }
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
  echo "setup: installing open_clip_ov2[$EXTRAS] into .venv (PyTorch's build for CUDA is large: several minutes)"
  "$VENV/bin/python" -m pip install --quiet --upgrade pip
  "$VENV/bin/python" -m pip install --quiet --editable "$ROOT[$EXTRAS]"
  echo "$STAMP" > "$VENV/.ov2-stamp-$EXTRAS"
fi
export PATH="$VENV/bin:$PATH"
