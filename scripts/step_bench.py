"""A training step under different settings, in turns in one process; `--profile`: where its time goes.

    python scripts/step_bench.py --group-tokens 64,128,256,512
    python scripts/step_bench.py --device cuda --model ov2-vit-l-14 --resolution 84 --batch-size 512 \
        --precision amp_bf16 --compile --grouped --group-tokens 1024,2048,4096 --memory-budget none,0.5
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from open_clip_ov2.compare.bench.cases import OWN_MODELS, CaptionLengths, Case, Job
from open_clip_ov2.compare.bench.worker import Worker
from open_clip_ov2.core import rows
from open_clip_ov2.openclip.run import bench_arm as seam
from open_clip_ov2.train import step

BACKENDS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


def build(args: argparse.Namespace, budget: str) -> Worker:
    case = Case(args.resolution, args.precision, args.batch_size)
    job = Job(
        arm="ov2", model=args.model, words_of=args.words_of or args.model, case=case, device=args.device,
        compile=args.compile, memory_budget=None if budget == "none" else float(budget), keep_ratio=None,
        lengths=CaptionLengths(), memory_limit_gb=None, threads=None,
    )  # fmt: skip
    return Worker(job)


def measure(args: argparse.Namespace, budget: str, attention: str) -> None:
    """All group sizes in turns; what is compiled is compiled anew."""
    torch.compiler.reset()
    worker = build(args, budget)
    ahead: Any = sdpa_kernel(BACKENDS[attention], set_priority=True) if attention in BACKENDS else None
    with ahead or contextlib.nullcontext():
        memory = worker.memory()
        peak = worker.peak()["flops"]
        seconds: dict[int | None, list[float]] = {tokens: [] for tokens in args.group_tokens}
        for turn in range(args.repetitions + 1):
            for tokens, found in seconds.items():
                if tokens is not None:
                    step.CPU_TOKENS = step.GPU_TOKENS = step.GPU_HALF_TOKENS = tokens
                time = worker.time(args.steps)["step_s"]
                if turn:
                    found.append(time)
        for tokens, found in seconds.items():
            median = statistics.median(found)
            rate = args.batch_size / median
            print(
                f"budget {budget:5} attention {attention:8} groups of {tokens or 'usual':>6}: {1e3 * median:8.1f} ms "
                f"({1e3 * min(found):.1f} to {1e3 * max(found):.1f}), {rate:8.1f} images/s, "
                f"{rate * worker.about()['image_flops'] / peak:.1%} of {peak / 1e12:.4g} TFLOP/s, "
                f"step memory {memory['step_bytes'] / 1e6:,.0f} MB, fixed {memory['fixed_bytes'] / 1e6:,.0f} MB",
                flush=True,
            )
        if args.profile:
            profile(worker)


def profile(worker: Worker) -> None:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if worker.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        worker.contender.run(worker._pool[:2])
        worker._wait()
    by = "self_cuda_time_total" if worker.device.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=70), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu")
    add("--model", default="ov2-bench-small")
    add("--resolution", type=int, default=112)
    add("--batch-size", type=int, default=16)
    add("--precision", default="fp32")
    add("--compile", action="store_true")
    add(
        "--group-tokens",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[None],
        help="caption tokens in a group of similar length; with --grouped also where a GPU takes rows of any length",
    )
    add("--grouped", action="store_true", help="no attention among rows of any length")
    add("--memory-budget", type=lambda text: text.split(","), default=["none"])
    add("--attention", type=lambda text: text.split(","), default=["default"], help="cudnn, flash: tried first")
    add("--words-of", metavar="MODEL", help="an ov2 model, whose vocabulary captions come from (default: --model)")
    add("--repetitions", type=int, default=3)
    add("--steps", type=int, default=4)
    add("--profile", action="store_true")
    args = parser.parse_args()
    for attention in args.attention:
        if attention != "default" and attention not in BACKENDS:
            parser.error(f"--attention {attention}: default, {', '.join(BACKENDS)}")
    if args.memory_budget != ["none"] and not args.compile:
        parser.error("--memory-budget: with --compile")
    if args.group_tokens != [None] and args.device != "cpu" and not args.grouped:
        parser.error("--group-tokens on a GPU: with --grouped")
    if args.grouped:
        rows.takes_half_kernels = lambda *_: False
    seam.add_models(OWN_MODELS)
    for budget, attention in itertools.product(args.memory_budget, args.attention):
        measure(args, budget, attention)


if __name__ == "__main__":
    main()
