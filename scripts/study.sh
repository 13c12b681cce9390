#!/usr/bin/env bash
# The comparisons of docs/results: ov2 against CoCa and CLIP in equal samples and in equal time, keep ratios, two stages;
# three seeds each. An hour and three quarters on 2 CPU cores, with other work beside it. It continues where it was
# stopped; SCALE=0.1 SEEDS=0 tries it out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh demo
DEMO=demo  # the comparisons' files name its tokenizer
DATA="$DEMO/data"
OUT="${OUT:-docs/results}"
python scripts/rendered_data.py "$DATA"

ov2 compare configs/compare/{ov2-coca-clip,equal-seconds,keep-ratio,two-stage}.toml \
  --train-data "$DATA/train/0000{0..5}.tar" \
  --val-data "$DATA/held-out/00000.tar" --probe-data "$DATA/train/00000.tar" \
  --title "Captions alone, or contrastive too: a small study on pictures that a CPU can learn" \
  --jobs "${JOBS:-2}" --out "$DEMO/study" ${SCALE:+--scale "$SCALE"} ${SEEDS:+--seeds "$SEEDS"}
mkdir -p "$OUT"
cp "$DEMO/study/"{index.html,results.md,results.csv,results.json} "$OUT/"
