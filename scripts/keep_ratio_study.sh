#!/usr/bin/env bash
# What makes the text decoder indifferent to the number of image tokens? Trains the demo's model at 32 px with one ratio
# and with a range, then evaluates both at several ratios. Uses the data of scripts/study.sh; about
# eight minutes on 2 cores. The result stands in dev/LOG.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh demo
DEMO="${DEMO:-demo}"
DATA="$DEMO/data"
python scripts/rendered_data.py "$DATA"
for RATIO in 0.35 0.25:1.0; do
  NAME="keep-${RATIO/:/-}"
  ov2 train --model ov2-vit-nano-8 --tokenizer "$DATA/tokenizer" --caption-keys json:captions --keep-ratio "$RATIO" \
    --train-data "$DATA/train/0000{0..5}.tar" --stage "${RESOLUTION:-32}:samples=${SAMPLES:-30k},crop-scale=1.0:1.0" \
    --batch-size 16 --lr 1e-3 --warmup 200 --workers 1 --logs "$DEMO/logs" --name "$NAME"
  printf '%s: ' "$NAME"
  ov2 eval "$DEMO/logs/$NAME" --data "$DATA/held-out/00000.tar" --caption-keys json:captions \
    --tasks keep-ratios --keep-ratios 0.2,0.35,0.6,1.0
done
