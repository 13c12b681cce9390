#!/usr/bin/env bash
# Everything on one machine without a GPU: install, make data from OpenMoji drawings and rendered shapes, charts and words,
# train a small ov2 model (at most 10 minutes on 2 cores), then show what it learned (docs/demo.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh demo
DEMO="${DEMO:-demo}"
DATA="$DEMO/data"
RUN="$DEMO/logs/ov2-nano"
run() { printf '\n$ %s\n' "$*"; "$@"; }

# bfloat16 is faster only on CPUs that multiply it in hardware.
PRECISION=fp32
if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then PRECISION=amp_bf16; fi
# OpenMP's threads sleep while they wait: spinning, two of them are slower than one where other processes run (dev/LOG.md).
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

mkdir -p "$DEMO"
run python scripts/demo_data.py "$DATA"
# The same command resumes a run that was interrupted, and does nothing if the run is finished.
run ov2 train --recipe configs/demo.toml --tokenizer "$DATA/tokenizer" \
  --train-data "$DATA/train/rendered-0000{0..7}.tar::$DATA/train/emoji-0000{0..3}.tar" \
  --val-data "$DATA/held-out/rendered-00000.tar" \
  --precision "$PRECISION" --report-to tensorboard --logs "$DEMO/logs" --name ov2-nano
run ov2 eval "$RUN" --tasks caption-loss,shuffled-loss,read-text --data "$DATA/held-out/rendered-00000.tar" \
  --caption-keys json:captions \
  --group-by json:kind --guess "$DATA/guess.json"
run ov2 plot "$RUN" --out "$DEMO/curves.png"
run ov2 caption "$DATA/held-out/rendered-00000.tar" "$DATA/held-out/emoji-00000.tar" --caption-keys json:captions \
  --every 31 --limit 24 --checkpoint "$RUN" --out "$DEMO/captions.png"
printf '\nLook at %s and %s; tensorboard --logdir %s shows the run.\n' "$DEMO/curves.png" "$DEMO/captions.png" "$DEMO/logs"
