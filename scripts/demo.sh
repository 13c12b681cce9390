#!/usr/bin/env bash
# Everything on one machine without a GPU: install; draw pictures of text, charts and shapes; let the model that ships in
# the package read them; train one from nothing in eight minutes; show what it learned (docs/demo.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh demo
DEMO=demo
DATA="$DEMO/short-data"  # configs/demo.toml names it
RUN="$DEMO/logs/ov2-nano"
run() { printf '\n$ %s\n' "$*"; "$@"; }

# bfloat16 is faster only on CPUs that multiply it in hardware.
PRECISION=fp32
if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then PRECISION=amp_bf16; fi
# One thread a process: scripts/demo_train.py starts a process on each core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

mkdir -p "$DEMO"
# Eight minutes are too short for long words, so the model that is trained here sees text of at most four letters.
run python scripts/rendered_data.py "$DATA" --train 0 --short 60000 --short-length 4 --held-out 150
PICTURES=("$DATA/held-out/00000.tar" --caption-keys json:captions --every 46 --limit 24)  # 46 = 5 x 9 + 1: each of the nine kinds in turn
run ov2 caption "${PICTURES[@]}" --out "$DEMO/shipped.png"

# The same command resumes a run that was interrupted, and does nothing if the run is finished.
run python scripts/demo_train.py --recipe configs/demo.toml --minutes "${MINUTES:-8}" --logs "$DEMO/logs" --name ov2-nano \
  --tokenizer "$DATA/tokenizer" --val-data "$DATA/short/00005.tar" --val-every-samples 20k --val-num-samples 400 --log-every-n-steps 25 \
  --precision "$PRECISION" --report-to tensorboard
run ov2 eval "$RUN" --tasks caption-loss,shuffled-loss --data "$DATA/short/00005.tar" --caption-keys json:captions
run ov2 eval "$RUN" --tasks read-text --data "$DATA/held-out/00000.tar" \
  --caption-keys json:captions --group-by json:kind --guess "$DATA/guess.json"
run ov2 plot "$RUN" --out "$DEMO/curves.png"
run ov2 caption "${PICTURES[@]}" --checkpoint "$RUN/checkpoints/stage_1.pt" --out "$DEMO/early.png"
run ov2 caption "${PICTURES[@]}" --checkpoint "$RUN" --out "$DEMO/captions.png"
printf '\nLook at %s (the shipped model), %s and %s (trained here, after a quarter and at the end), and %s.\n' \
  "$DEMO/shipped.png" "$DEMO/early.png" "$DEMO/captions.png" "$DEMO/curves.png"
printf 'tensorboard --logdir %s shows the run.\n' "$DEMO/logs"
