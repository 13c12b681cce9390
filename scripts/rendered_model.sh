#!/usr/bin/env bash
# Makes the model that the package ships, `ov2-vit-nano-8:rendered`, from nothing: fonts from npm, 520,000 rendered pictures,
# three stages of training, an evaluation of held-out pictures, and the folder src/open_clip_ov2/pretrained/rendered.
# Training takes two hours and ten minutes on one core with AVX2 alone, drawing and evaluation a quarter; the same command resumes. Another
# number of threads, or another CPU, rounds differently.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh demo
DATA=rendered/data  # configs/rendered.toml names it
RUN=rendered/logs/ov2-nano-rendered
export OMP_NUM_THREADS="${THREADS:-1}"

python scripts/fonts.py rendered/fonts
python scripts/rendered_data.py "$DATA" --train 400000 --short 120000 --held-out 1000 --fonts rendered/fonts
ov2 train --recipe configs/rendered.toml --tokenizer "$DATA/tokenizer" --val-data "$DATA/held-out/00000.tar" \
  --precision fp32 --report-to tensorboard --logs rendered/logs --name ov2-nano-rendered
ov2 eval "$RUN" --tasks caption-loss,read-text --data "$DATA/held-out/00000.tar" --caption-keys json:captions \
  --group-by json:kind --guess "$DATA/guess.json"
rm -rf rendered/export
ov2 export "$RUN" --to ov2 --out rendered/export --license apache-2.0 \
  --dataset "rendered text, charts and shapes (scripts/rendered_data.py)"
python scripts/ship_model.py rendered/export ov2-vit-nano-8 rendered
