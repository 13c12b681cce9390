"""`ov2 plan`: what an `ov2 train` command line will do and cost, before a GPU is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from open_clip_ov2 import training
from open_clip_ov2.argv import Parser, flag_type
from open_clip_ov2.recipe import costs
from open_clip_ov2.tables import real, whole

DESCRIPTION = (
    "What `ov2 train` with these flags will do and cost: tokens, steps, FLOPs, memory, hours. It takes a recipe file "
    "and all flags of `ov2 train` (--model, --stage, --batch-size, ...); no data is needed."
)


def main(argv: Sequence[str]) -> None:
    args, flags = _parser().parse_known_args(argv)
    for index, word in enumerate(flags):  # RECIPE, which is first, or anywhere if its name tells
        if (index == 0 and not word.startswith("-")) or (word.endswith(".toml") and flags[index - 1] != "--recipe"):
            flags[index : index + 1] = ["--recipe", word]
            break
    if args.context_length is not None:
        flags += ["--force-context-length", args.context_length]
    plan = training.plan(
        flags,
        args.gpus,
        mean_caption_tokens=args.mean_caption_tokens,
        tflops=args.device_tflops,
        mfu=args.mfu,
        memory_gb=args.gpu_memory_gb,
        images_per_second=args.images_per_second,
    )
    from open_clip_ov2.commands.plan_report import as_json, show

    if args.json:
        print(json.dumps(as_json(plan), indent=2))
    else:
        show(plan)


def _parser() -> Parser:
    usage = "ov2 plan [RECIPE.toml] [flags of ov2 train] [flags below]"
    parser = Parser(prog="ov2 plan", description=DESCRIPTION, usage=usage)
    above_zero = flag_type(real(0, above=True))
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--context-length", metavar="N", help="the same as --force-context-length of ov2 train")
    parser.add_argument(
        "--mean-caption-tokens", type=above_zero, metavar="M",
        help="real tokens of a caption, end of text included; an ov2 model computes little else (default: all)",
    )  # fmt: skip
    add = parser.add_argument_group("machine").add_argument
    add("--gpus", type=flag_type(whole(1)), default=1, metavar="N", help="default: 1")
    add(
        "--images-per-second", type=flag_type(_each(real(0, above=True))), default=(), metavar="X[,Y,...]",
        help="measured speed of ONE GPU: one number for all stages, or one each",
    )  # fmt: skip
    add(
        "--device-tflops", type=above_zero, default=costs.H100_TFLOPS, metavar="T",
        help="dense matrix rate of one GPU (default: %(default)g, bf16, measured on an H100)",
    )  # fmt: skip
    add(
        "--mfu", "--utilisation", type=flag_type(real(0, 1, above=True)), default=costs.MFU, metavar="U",
        help="fraction of that rate which training reaches, if no images per second are given (default: %(default)g)",
    )  # fmt: skip
    add("--gpu-memory-gb", type=above_zero, default=costs.H100_MEMORY_GB, metavar="G", help="default: 80")
    return parser


def _each(read: Callable[[Any], float]) -> Callable[[str], tuple[float, ...]]:
    return lambda text: tuple(read(part) for part in text.split(","))
