"""Train the demo's model from nothing within a given time.

    python scripts/demo_train.py --recipe configs/demo.toml --minutes 8 --logs demo/logs --name ov2-nano \\
        [flags of ov2 train]

One process a core, four at most: a model this small is no faster with two threads (dev/LOG.md). Measures how many
images/s each stage of the recipe reaches on this machine, scales the samples of the stages so that training takes that
long, and trains with `ov2 train`. If the run is there already, it is resumed as it was planned.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from open_clip_ov2.recipe import Recipe, Stage, dump_recipe, load_recipe

PROCESSES = min(4, os.cpu_count() or 1)
MEASURED_STEPS = 40
RESERVE = 0.15  # of the measured speed: a machine that has just begun to work is faster than it stays
STARTING = 15  # seconds that a run spends before its first step, between stages and in validation


def torchrun(flags: list[str]) -> list[str]:
    """Its arguments for `ov2 train` in PROCESSES processes."""
    return ["--standalone", "--nproc-per-node", str(PROCESSES), "-m", "open_clip_ov2", "--", "train", *flags]


def train(flags: list[str]) -> None:
    """`ov2 train` in PROCESSES processes; exits with their status if they fail."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *torchrun(flags)], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def with_batches(stage: Stage, number: int) -> Stage:
    """The stage with so many global batches, at least one."""
    samples = max(number, 1) * (stage.global_batch or 1)
    return replace(stage, samples=samples, warmup_samples=min(stage.warmup_samples or 0, samples))


def measured(recipe: Recipe, flags: list[str]) -> list[float]:
    """Images/s of each stage, from a run of MEASURED_STEPS steps each that is thrown away."""
    with tempfile.TemporaryDirectory() as scratch:
        short = [
            replace(stage, samples=MEASURED_STEPS * (stage.global_batch or 1), warmup_samples=0)
            for stage in recipe.stages
        ]
        path = Path(scratch) / "measure.toml"
        path.write_text(dump_recipe(replace(recipe, stages=tuple(short))), encoding="utf-8")
        train(["--recipe", str(path), *flags, "--logs", scratch, "--name", "measure", "--log-every-n-steps", "20"])
        lines = (Path(scratch) / "measure" / "results.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    last = {row["stage"]: row["images_per_second"] for row in rows if row["kind"] == "train"}
    return [last[number] for number in range(1, len(short) + 1)]


def scaled(recipe: Recipe, rates: list[float], seconds: float) -> Recipe:
    """The recipe with samples for that many seconds, each stage's share as it was, in whole global batches."""
    needed = sum(stage.samples / rate for stage, rate in zip(recipe.stages, rates, strict=True))
    stages = [
        with_batches(stage, round(stage.samples * seconds / needed / (stage.global_batch or 1)))
        for stage in recipe.stages
    ]
    return replace(recipe, stages=tuple(stages))


def main() -> None:
    """Measure, plan, train."""
    parser = argparse.ArgumentParser(description="Train the demo's model from nothing within a given time.")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="time for training, measuring included")
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--name", required=True)
    args, flags = parser.parse_known_args()
    planned = args.logs / f"{args.name}.toml"
    if not planned.exists():
        recipe = load_recipe(args.recipe)
        print("Measuring the speed of this machine ...", flush=True)
        started = time.monotonic()
        rates = [(1 - RESERVE) * rate for rate in measured(recipe, flags)]
        recipe = scaled(recipe, rates, 60 * args.minutes - STARTING - (time.monotonic() - started))
        for stage, rate in zip(recipe.stages, rates, strict=True):
            seconds = stage.samples / rate
            print(f"{stage.title}: {rate:.0f} images/s or more, so {stage.samples:,} samples in {seconds:.0f} s")
        args.logs.mkdir(parents=True, exist_ok=True)
        planned.write_text(dump_recipe(recipe), encoding="utf-8")
    else:
        print(f"{planned}: the stages as they were planned before; remove it and the run for another time", flush=True)
    train(["--recipe", str(planned), *flags, "--logs", str(args.logs), "--name", args.name])


if __name__ == "__main__":
    main()
