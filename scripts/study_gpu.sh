#!/usr/bin/env bash
# The main question of scripts/study.sh with S/16 at 112 px and then 224 px, a minute an arm, one GPU.
#   bash scripts/study_gpu.sh data   # where npm can be reached: study/, under 60 MB
#   bash scripts/study_gpu.sh        # where the GPU is, with study/ brought along: study/gpu/index.html
# SCALE=0.001 tries it out (on a CPU with PRECISION=fp32 BATCH=8 WORKERS=0). VENV_READY=1 takes the Python that is active.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -n "${VENV_READY:-}" ] || source scripts/setup_venv.sh demo
DATA=study
OUT="${OUT:-$DATA/gpu}"
if [ "${1:-}" = data ]; then
  python scripts/icons_data.py "$DATA/icons" --size 112 --names-in-families 20 --held-out 1500 --limit "${ICONS:-10000}"
  python scripts/rendered_data.py "$DATA/words" --size 112 --train "${WORDS:-6000}" --short 0 --held-out 60
  size=$(du -cm "$DATA/icons" "$DATA/words" | tail -1 | cut -f1)
  [ "$size" -lt 60 ] || { echo "study_gpu.sh: the data take $size MB; give fewer ICONS or WORDS" >&2; exit 1; }
  echo "$size MB in $DATA/"; exit 0
fi
python scripts/mix_shards.py "$DATA/read" "$DATA"/words/train/*.tar --shard 3000 > /dev/null  # what read-probe trains on
TRAIN="$(python scripts/mix_shards.py "$DATA/train" "$DATA"/icons/train/*.tar "$DATA"/words/train/*.tar --shard 1000)"
FLAGS=(${PRECISION:+--precision "$PRECISION"} ${WORKERS:+--workers "$WORKERS"})
python -m open_clip_ov2 compare "${CONFIG:-configs/compare/gpu.toml}" --train-data "$TRAIN" \
  --val-data "$DATA/icons/unseen-families/00000.tar" --out "$OUT" ${SCALE:+--scale "$SCALE"} \
  ${FLAGS[0]:+-- "${FLAGS[@]}"}
cat "$OUT/answers.md"
