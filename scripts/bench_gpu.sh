#!/usr/bin/env bash
# The GPU figures of docs/performance.md, on one GPU of 80 GB or more; about an hour. Results: $OUT/PART/bench.{md,json,png}.
#   bash scripts/bench_gpu.sh                    # everything
#   bash scripts/bench_gpu.sh targets largest    # some parts
#   REPETITIONS=3 STEPS=5 bash scripts/bench_gpu.sh smoke
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PARTS=(smoke targets eager wide largest giant)
[ $# -gt 0 ] || set -- targets eager wide largest giant
for part in "$@"; do
  [[ " ${PARTS[*]} " == *" $part "* ]] || { echo "bench_gpu: no part '$part' (there are: ${PARTS[*]})" >&2; exit 2; }
done
# Nothing is installed here: which build of PyTorch a GPU needs is for its owner to say.
command -v ov2 >/dev/null || { echo "bench_gpu: no ov2 on PATH; activate the environment that has it" >&2; exit 1; }
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "bench_gpu: torch sees no GPU here" >&2; exit 1; }
OUT="${OUT:-bench/gpu-$(date +%F)}"
COMMON=(--precision amp_bf16 --repetitions "${REPETITIONS:-5}" --steps "${STEPS:-10}" --caption-tokens 12:128:64)
bench() { local part="$1"; shift; printf '\n$ ov2 bench %s\n' "$*"; ov2 bench "$@" "${COMMON[@]}" --out "$OUT/$part"; }

# Does it all work? A minute.
smoke() { bench smoke --model ov2-vit-b-16 --resolution 224 --batch-size 32 --largest-batch --memory-limit-gb 20; }

# L/14 at both resolutions of its stages, at equal batch; the counterparts and stock OpenCLIP's own coca_ViT-L-14.
targets() {
  bench targets-224 --model ov2-vit-l-14 --arms ov2,coca_ViT-L-14,coca,clip --resolution 224 --batch-size 64,128,256 --compile
  bench targets-84 --model ov2-vit-l-14 --arms ov2,coca_ViT-L-14,coca,clip --resolution 84 --batch-size 128,256,512 --compile
}

# The same without torch.compile, as stock OpenCLIP runs by default.
eager() {
  bench eager-224 --model ov2-vit-l-14 --arms ov2,coca_ViT-L-14 --resolution 224 --batch-size 64,128,256
  bench eager-84 --model ov2-vit-l-14 --arms ov2,coca_ViT-L-14 --resolution 84 --batch-size 128,256,512
}

# ov2 alone at batches that stock cannot hold, and without token dropping.
wide() {
  bench wide-224 --model ov2-vit-l-14 --arms ov2 --resolution 224 --batch-size 256,384,512 --compile
  bench wide-84 --model ov2-vit-l-14 --arms ov2 --resolution 84 --batch-size 512,1024,1536 --compile
  bench keep-1 --model ov2-vit-l-14 --arms ov2 --resolution 224 --batch-size 256 --keep-ratio 1.0 --compile
}

# The largest batch of each; one timed repetition at a batch that all can hold.
largest() {
  COMMON=(--precision amp_bf16 --repetitions 1 --steps 2 --caption-tokens 12:128:64)
  bench largest --model ov2-vit-l-14 --arms ov2,coca_ViT-L-14,clip --resolution 224,84 --batch-size 64 --largest-batch
}

# 1.01 B parameters on one card.
giant() { bench giant --model ov2-vit-g-14 --arms ov2 --resolution 224 --batch-size 16,32,64 --compile --largest-batch; }

for part in "$@"; do "$part"; done
echo "results: $OUT"
