#!/usr/bin/env bash
# What recaptions are worth: one encoder, trained on the same pictures with alt-texts of which half are wrong, with
# captions that the package's own model wrote from the picture alone or given the alt-text, filtered and not, with true
# captions, and on the clean quarter alone; three seeds (configs/compare/recaptions.toml). It writes study/recaptions-results.
# About half an hour on two CPU cores, beside the data, which scripts/study.sh makes too; it continues where it
# was stopped. SCALE=0.01 SEEDS=0 tries it out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh demo
DATA=study  # the comparison's file names it
SETS="$DATA/recaptions"
TAKE="$(python -c "print(max(160, round(3000 * ${SCALE:-1})))")"
TUNE="$(python -c "print(max(64, round(10000 * ${SCALE:-1})))")"
[ -n "${DATA_IS_MADE:-}" ] || {
  python scripts/icons_data.py "$DATA/icons" --size 96 --names-in-families 20 --held-out 2000
  python scripts/rendered_data.py "$DATA/words" --size 96 --train 30000 --short 0 --held-out 150
}
TRAIN="$(python scripts/captions_noise.py "$DATA/noisy" "$DATA"/{icons,words}/train/00000.tar --take "$TAKE")"

# The captioner that is given alt-texts learns on the clean quarter, from alt-texts as noisy as the others.
OMP_NUM_THREADS="${THREADS:-2}" OMP_WAIT_POLICY=passive ov2 train --model ov2-vit-nano-8 \
  --pretrained src/open_clip_ov2/pretrained/rendered/open_clip_model.safetensors --tokenizer src/open_clip_ov2/pretrained/rendered \
  --force-context-length 32 --opt timm/muon --lr 5e-4 --wd 0.2 --warmup-samples 800 --batch-size 32 --workers 0 --precision fp32 \
  --train-data "$TRAIN" --caption-keys json:clean --prompt-keys json:prompt=3,none=1 \
  --stage "64:samples=$TUNE,crop-scale=1.0:1.0,keep-ratio=0.5:1.0,eval-keep-ratio=1.0" --logs "$DATA/captioner" --name tuned --seed 0

write() { # NAME FLAGS...: captions of all pictures, and the same filtered
  local name="$1"; shift
  OMP_NUM_THREADS=1 ov2 captions write "$TRAIN" --out "$SETS/$name" "$@"
}
filtered() { # NAME: what the picture makes likelier by 0.3 nats a token, by the captioner that has seen icons
  OMP_NUM_THREADS=1 ov2 captions filter "$SETS/$1" --out "$SETS/$1-filtered" --score "likelihood:$DATA/captioner/tuned>0.3"
}
{ write picture --model ov2-vit-nano-8:rendered && filtered picture; } & FIRST=$!
write given --model "$DATA/captioner/tuned" --condition json:alt
filtered given
write tuned --model "$DATA/captioner/tuned"
wait $FIRST
for name in picture-filtered given-filtered tuned; do ov2 captions report "$SETS/$name"; done

ov2 compare configs/compare/recaptions.toml --train-data "$TRAIN" \
  --val-data "$DATA/words/held-out/00000.tar::$DATA/icons/unseen-families/00000.tar" --jobs "${JOBS:-2}" \
  --title "What recaptions are worth" --out "$DATA/recaptions-results" ${SCALE:+--scale "$SCALE"} ${SEEDS:+--seeds "$SEEDS"}
cat "$DATA/recaptions-results/answers.md"
