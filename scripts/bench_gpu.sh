#!/usr/bin/env bash
# The GPU figures of docs/performance.md, on one GPU of 80 GB or more. Results: $OUT, a table of each part.
#   bash scripts/bench_gpu.sh                    # everything; about an hour
#   bash scripts/bench_gpu.sh kernels steps      # some parts; these two, the figures of the page, are ten minutes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PARTS=(smoke kernels steps targets eager largest giant)
[ $# -gt 0 ] || set -- "${PARTS[@]}"
for part in "$@"; do
  [[ " ${PARTS[*]} " == *" $part "* ]] || { echo "bench_gpu: no part '$part' (there are: ${PARTS[*]})" >&2; exit 2; }
done
# Nothing is installed here: which build of PyTorch a GPU needs is for its owner to say.
python -c 'import open_clip_ov2' || { echo "bench_gpu: no open_clip_ov2 here; activate the environment that has it" >&2; exit 1; }
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "bench_gpu: torch sees no GPU here" >&2; exit 1; }
OUT="${OUT:-bench/gpu-$(date +%F)}"
mkdir -p "$OUT"
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
COMMON=(--precision amp_bf16 --repetitions "${REPETITIONS:-5}" --steps "${STEPS:-10}" --caption-tokens 12:128:64)
bench() {
  local part="$1"; shift
  printf '\n$ ov2 bench %s\n' "$*"
  python -m open_clip_ov2 bench "${COMMON[@]}" "$@" --out "$OUT/$part"
}

# Does it all work? A minute.
smoke() { bench smoke --model ov2-vit-b-16 --resolution 224 --batch-size 32 --repetitions 2 --steps 2; }

kernels() { python scripts/kernel_bench.py --device cuda | tee "$OUT/kernels.txt"; }

# The table of the page: each variant alone on the GPU.
steps() {
  local COMMON=("${COMMON[@]}" --model ov2-vit-l-14)
  bench steps/ov2-224 --variants ov2 --resolution 224 --batch-size 256 --compile
  bench steps/ov2-224-eager --variants ov2 --resolution 224 --batch-size 128
  bench steps/ov2-224-budget --variants ov2 --resolution 224 --batch-size 640 --compile --memory-budget 0.3
  bench steps/ov2-84 --variants ov2 --resolution 84 --batch-size 1024 --compile
  bench steps/coca-224 --variants coca_ViT-L-14 --resolution 224 --batch-size 128
  bench steps/coca-84 --variants coca_ViT-L-14 --resolution 84 --batch-size 256
}

# The same in turns, compiled: the baselines, and stock OpenCLIP's own coca_ViT-L-14.
targets() {
  bench targets-224 --model ov2-vit-l-14 --variants ov2,coca_ViT-L-14,coca,clip --resolution 224 --batch-size 64,128 --compile
  bench targets-84 --model ov2-vit-l-14 --variants ov2,coca_ViT-L-14,coca,clip --resolution 84 --batch-size 128,256 --compile
}

# And without torch.compile, as stock OpenCLIP runs by default.
eager() {
  bench eager-224 --model ov2-vit-l-14 --variants ov2,coca_ViT-L-14,clip --resolution 224 --batch-size 64,128
  bench eager-84 --model ov2-vit-l-14 --variants ov2,coca_ViT-L-14,clip --resolution 84 --batch-size 128,256
}

# The largest batch of each; one timed repetition at a batch that all can hold.
largest() {
  local COMMON=(--precision amp_bf16 --repetitions 1 --steps 2 --caption-tokens 12:128:64)
  bench largest --model ov2-vit-l-14 --variants ov2,coca_ViT-L-14,clip --resolution 224,84 --batch-size 64 --largest-batch
  bench largest-budget --model ov2-vit-l-14 --variants ov2 --resolution 224 --batch-size 640 --compile --memory-budget 0.3 \
    --largest-batch
}

# 1.01 B parameters on one card.
giant() { bench giant --model ov2-vit-g-14 --variants ov2 --resolution 224 --batch-size 32,64 --compile; }

for part in "$@"; do "$part"; done
echo "results: $OUT"
