#!/usr/bin/env bash
# The study of docs/results: seven ways to train one encoder, on real icons and rendered words, and answers with their
# intervals; three seeds. It writes docs/results, docs/study.md and the answers in README.md. On 2 CPU cores that train
# ov2 at 160 images/s each, some 105 minutes by calculation; at 70, two and a half hours (dev/LOG.md). It continues where it
# was stopped. SCALE=1.4 gives each run 1.4 times the time or samples; SCALE=0.001 SEEDS=0 OUT=/tmp/results tries it out, and
# then neither README.md nor docs/study.md is touched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh demo
DATA=study  # the comparisons' files name it
OUT="${OUT:-docs/results}"
[ -n "${DATA_IS_MADE:-}" ] || {
  python scripts/icons_data.py "$DATA/icons" --size 96 --names-in-families 20 --held-out 2000
  python scripts/rendered_data.py "$DATA/words" --size 96 --train 30000 --short 0 --held-out 150
}
python scripts/pixel_knn.py "$DATA"/icons/probe-{train,test}/00000.tar "$DATA/pixels.json"
python scripts/mix_shards.py "$DATA/read" "$DATA"/words/train/*.tar --shard 3000 > /dev/null  # what read-probe trains on
TRAIN="$(python scripts/mix_shards.py "$DATA/train" "$DATA"/icons/train/*.tar "$DATA"/words/train/*.tar)"

COMMAND=(configs/compare/{equal-seconds,equal-samples,keep-ratio,two-stage}.toml
  --train-data "$TRAIN" --val-data "$DATA/icons/unseen-families/00000.tar"
  --title "Captions alone, or contrastive too: a study on real icons and rendered words"
  --jobs "${JOBS:-2}" --out "$DATA/results" ${SCALE:+--scale "$SCALE"} ${SEEDS:+--seeds "$SEEDS"})
ov2 compare "${COMMAND[@]}"
mkdir -p "$OUT"
cp "$DATA/results/"{index.html,results.md,results.csv,results.json} "$OUT/"
[ "$OUT" != docs/results ] || python scripts/study_pages.py "$DATA/results/answers.md"
