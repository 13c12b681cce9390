#!/usr/bin/env bash
# The GPU figures of docs/performance.md by one command, in 12 minutes on one GPU of 80 GB or more. Results: $OUT/table.md,
# written again after each row, so that a run that is cut off leaves what it has measured; rows.jsonl, and kernels.txt.
#   bash scripts/bench_gpu.sh                      # rows in the order of their value, until MINUTES are over
#   bash scripts/bench_gpu.sh l14-224 l14-84       # some rows; `bash scripts/bench_gpu.sh --list` names them
#   TINY=1 bash scripts/bench_gpu.sh               # all of it on a CPU, with models of no use
# Without PyPI: WHEELS names a folder of wheels that this Python lacks (open_clip_torch 3.3, webdataset, braceexpand, ftfy,
# simplejpeg, submitit, torchao), which go into a folder of their own. PyTorch is never installed here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-$(command -v python || command -v python3)}"
export OUT="${OUT:-bench/gpu-$(date +%F)}"
WHEELS="${WHEELS:-wheels}"
if [ -d "$WHEELS" ]; then
  site="$(mktemp -d)"
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$PYTHON" -c 'import open_clip_ov2' 2>/dev/null || export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
[ "${TINY:-0}" = 1 ] && export TORCHDYNAMO_DISABLE=1  # torch.compile then compiles nothing
exec "$PYTHON" scripts/gpu_table.py "$@"
