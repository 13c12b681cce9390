#!/usr/bin/env bash
# A multimodal model on one machine without a GPU: install; draw pictures; train a small language model on text; let it see
# through the encoder in the package; ask it about pictures it has not seen (docs/vlm.md). Flags go to scripts/demo_vlm.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh demo,vlm
exec python scripts/demo_vlm.py "${OUT:-demo/vlm}" "$@"
