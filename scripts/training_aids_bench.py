"""What the training aids of `ov2 train` cost: CPU time of a step with and without each, in turns.

python scripts/training_aids_bench.py [--repetitions 9] [--batch-size 16]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from open_clip_ov2 import training
from open_clip_ov2.compare.bench.measured_step import Vocabulary, synthetic_batch
from open_clip_ov2.compare.bench.settings import BENCH_MODELS, CaptionLengths
from open_clip_ov2.train.ema import WeightAverage

AIDS = {
    "none": "",
    "--ema-decay 0.9998": "--ema-decay 0.9998",
    "--lr-layer-decay 0.9": "--lr-layer-decay 0.9",
    "--lora-rank 8": "--lora-rank 8",
    "--lora-rank 8 --freeze 'text_decoder.*'": "--lora-rank 8 --freeze text_decoder.*",
    "--lock-image": "--lock-image",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=16)
    asked = parser.parse_args()
    flags = ["--model", "ov2-bench-small", "--force-image-size", "112", "--batch-size", str(asked.batch_size)]
    flags += ["--train-data", "none.tar", "--train-num-samples", "1000000", "--precision", "fp32"]
    models, averages = {}, {}
    for name, aids in AIDS.items():
        models[name] = training.bench_model([*flags, *aids.split()], "cpu", (), BENCH_MODELS)
        averages[name] = WeightAverage(models[name].model, 0.9998) if "ema" in aids else None
    words = Vocabulary(*models["none"].caption_ids("ov2-bench-small"))
    pair = synthetic_batch(asked.batch_size, 112, 128, CaptionLengths(), words, seed=0)
    times: dict[str, list[float]] = {name: [] for name in AIDS}
    for repetition in range(asked.repetitions + 1):  # the first is not counted
        for name, model in models.items():
            start = time.process_time()
            model.run([pair])
            if (average := averages[name]) is not None:
                average.update()
            if repetition:
                times[name].append(time.process_time() - start)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {asked.batch_size}")
    for name, found in times.items():
        ratios = sorted(one / none for one, none in zip(found, times["none"], strict=True))
        ms, ratio = 1e3 * statistics.median(found), statistics.median(ratios)
        print(f"{name:42s} {ms:7.0f} ms {ratio:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
