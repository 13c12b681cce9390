#!/usr/bin/env bash
# The comparisons of docs/results: ov2 against CoCa and CLIP, keep ratios, two stages; three seeds each. About an hour
# on 2 CPU cores. It goes on where it was stopped; BUDGET=2000 SEEDS=0 tries it out in a few minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh demo
DEMO="${DEMO:-demo}"
DATA="$DEMO/data"
OUT="${OUT:-docs/results}"
python scripts/demo_data.py "$DATA"

BENCH="$DEMO/study/bench"
if [ ! -f "$BENCH/bench.json" ]; then # step memory and largest batch, captions as long as the demo's
  ov2 bench --model ov2-vit-nano-8 --resolution 32 --precision amp_bf16 --batch-size 32 --repetitions 3 --steps 4 \
    --caption-tokens 6:24:14 --threads 1 --largest-batch --memory-limit-gb 1 --out "$BENCH"
fi
ov2 compare configs/compare/{ov2-coca-clip,keep-ratio,two-stage}.toml \
  --train-data "$DATA/train/rendered-0000{0..7}.tar::$DATA/train/emoji-0000{0..3}.tar" \
  --val-data "$DATA/held-out/rendered-00000.tar" --probe-data "$DATA/train/rendered-0000{0..1}.tar" \
  --title "Captions alone, or contrastive too: a small study on pictures that a CPU can learn" \
  --bench "$BENCH/bench.json" --jobs "${JOBS:-2}" --out "$DEMO/study" ${BUDGET:+--budget "$BUDGET"} ${SEEDS:+--seeds "$SEEDS"}
mkdir -p "$OUT"
cp "$DEMO/study/"{index.html,results.md,results.csv,results.json} "$OUT/"
