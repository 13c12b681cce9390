#!/usr/bin/env bash
# Reading wide and tall text at equal tokens: images that keep their shapes against images squeezed into a square.
# From the weights of the package, at most 64 tokens an image in both arms, the same pictures, steps and learning rate; both
# arms of a seed run side by side, a core each. By calculation seven minutes for three seeds on two idle cores, at the 95
# images/s that one core made for dev/LOG.md. It continues where it was stopped; SEEDS="0 1", SAMPLES=6400, OUT=aspect.
# docs/demo.md has its table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh demo
OUT="${OUT:-aspect}" SAMPLES="${SAMPLES:-6400}"
export OMP_NUM_THREADS=1
python scripts/aspect_data.py "$OUT/data" --train 10000
mkdir -p "$OUT/eval"

read_text() {  # NAME MODEL FLAGS...
  [ -f "$OUT/eval/$1.json" ] || ov2 eval "$2" --tasks read-text --data "$OUT/data/held-out/00000.tar" \
    --caption-keys json:captions --group-by json:kind --out "$OUT/eval/$1.json" "${@:3}"
}

arm() {  # NAME SEED FLAGS...
  ov2 train --model ov2-vit-nano-8:rendered --train-data "$OUT/data/train/{00000..00004}.tar" \
    --train-num-samples "$SAMPLES" --epochs 1 --batch-size 32 --workers 0 --seed "$2" --precision fp32 \
    --opt timm/muon --lr 1e-3 --wd 0.05 --grad-clip-norm 1.0 --warmup 20 --keep-ratio 1.0 --eval-keep-ratio 1.0 \
    --aug-cfg "scale=(1.0,1.0)" "ratio=(0.01,100.0)" --logs "$OUT/logs" --name "$1-$2" "${@:3}"  # whole images
  read_text "$1-$2" "$OUT/logs/$1-$2"
}

read_text "as shipped, cropped-0" ov2-vit-nano-8:rendered
read_text "as shipped, native-0" ov2-vit-nano-8:rendered --aspect native
for seed in ${SEEDS:-0 1 2}; do
  arm native "$seed" --aspect native --max-tokens 64 &
  arm squeezed "$seed" --force-image-size 64 --image-resize-mode squash
  wait $!
done
python scripts/aspect_data.py --table "$OUT/eval"
