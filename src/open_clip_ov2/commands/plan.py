"""`ov2 plan`: what an `ov2 train` command line will do and cost, before a GPU is asked for."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from open_clip_ov2 import training
from open_clip_ov2.argv import Parser, flag_type
from open_clip_ov2.recipe import costs, short_count
from open_clip_ov2.recipe.costs import Machine, Plan, StageCost
from open_clip_ov2.tables import each, real, whole
from open_clip_ov2.tracking.text_table import on_console
from open_clip_ov2.vlm import vlm_costs, vlm_plan

GB, GFLOP = 1e9, 1e9
DESCRIPTION = (
    "What `ov2 train` with these flags will do and cost: tokens, steps, FLOPs, memory, hours. It takes a recipe file "
    "and all flags of `ov2 train` (--model, --stage, --batch-size, ...); no data is needed."
)


def main(argv: Sequence[str]) -> None:
    args, flags = _parser().parse_known_args(argv)
    one_gpu = {"tflops": args.device_tflops, "mfu": args.mfu, "memory_gb": args.gpu_memory_gb}
    one_gpu["images_per_second"] = args.images_per_second
    if args.vlm is None:
        flags = _with_recipe(flags)
        if args.context_length is not None:
            flags += ["--force-context-length", args.context_length]
        plan = training.plan(flags, args.gpus, mean_caption_tokens=args.mean_caption_tokens, **one_gpu)
    else:
        multimodal = vlm_plan.plan_of_recipe(args.vlm, flags)
        plan = vlm_costs.plan_costs(multimodal, Machine(args.gpus, **one_gpu))
    if args.json:
        print(json.dumps(as_json(plan), indent=2))
        return
    show(plan)
    if args.vlm is not None:
        print("An image is a conversation with its picture.", *vlm_plan.fitting_commands(multimodal, plan), sep="\n")


def _with_recipe(flags: list[str]) -> list[str]:
    """With --recipe before RECIPE, which is first, or anywhere if its name tells."""
    for index, word in enumerate(flags):
        named = word.endswith(".toml") and flags[index - 1] != "--recipe"
        if not word.startswith("-") and (index == 0 or named):
            return [*flags[:index], "--recipe", *flags[index:]]
    return flags


def _parser() -> Parser:
    usage = "ov2 plan [RECIPE.toml] [flags of ov2 train] [flags below]"
    parser = Parser(prog="ov2 plan", description=DESCRIPTION, usage=usage)
    above_zero, speeds = flag_type(real(0, above=True)), each(real(0, above=True))
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--vlm", metavar="RECIPE",
        help=f"plan `ov2 vlm train` instead: its recipe, then ENCODER (default: {vlm_plan.ENCODER}) and its flags",
    )  # fmt: skip
    parser.add_argument("--context-length", metavar="N", help="the same as --force-context-length of ov2 train")
    parser.add_argument(
        "--mean-caption-tokens", type=above_zero, metavar="M",
        help="real tokens of a caption, end of text included; an ov2 model computes little else (default: all)",
    )  # fmt: skip
    add = parser.add_argument_group("machine").add_argument
    add("--gpus", type=flag_type(whole(1)), default=1, metavar="N", help="default: 1")
    add(
        "--images-per-second", type=flag_type(lambda text: speeds(text.split(","))), default=(), metavar="X[,Y,...]",
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


def show(plan: Plan) -> None:
    console = Console(highlight=False)
    parts = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in plan.parameters.items())
    console.print(f"{plan.model}: {sum(plan.parameters.values()) / 1e6:,.1f} M parameters ({parts})")
    titles = [one.images if one.title == one.images else f"{one.title}: {one.images}" for one in plan.stages]
    cells = [_figures(cost)[0] for cost in plan.stages]
    rows = [[name, *(stage[name] for stage in cells)] for name in cells[0]]
    console.print(on_console([["", *titles], *rows], justify="right"))
    console.print(_whole_run(plan))
    for line in filter(None, (cost.memory_advice() for cost in plan.stages)):
        console.print(line)
    if plan.baselines:
        console.print(on_console(_comparison(plan), justify="right"))
        console.print(
            "CoCa and CLIP: the same encoder, text towers as wide and deep as the decoder, captions as long for CoCa, "
            "77 tokens for CLIP."
        )


def _figures(cost: StageCost) -> tuple[dict[str, str], dict[str, Any]]:
    """Of a stage: cells of the table by the name of their row, and plain numbers by their name in JSON."""
    cells: dict[str, str] = {}
    plain: dict[str, Any] = {"resolution": cost.resolution}

    def add(row: str, cell: str, *names: str, **further: Any) -> None:
        """A row, which JSON has as attributes of the cost, or as `further` names."""
        cells[row] = cell
        plain.update({name: getattr(cost, name) for name in names}, **further)

    tokens, flops, gpu_hours = cost.tokens, cost.flops_per_image, cost.gpu_hours
    parts = {name: part.total for name, part in cost.parts.items()}
    memory = {**asdict(cost.memory), "activations": cost.batch_size * cost.memory.per_image}
    times = "" if cost.accum_freq == 1 else f" = {cost.accum_freq} x {cost.batch_size:,}"
    recomputed = ", recomputed" if cost.grad_checkpointing else ""
    add("samples", short_count(cost.samples), "samples")
    add("tokens: encoder / kept / text", f"{tokens.encoder} / {tokens.kept or '-'} / {tokens.text}")
    add("tokens to the head", f"{tokens.targets:g}", tokens=asdict(tokens))
    add("global batch", f"{cost.global_batch:,}", "global_batch")
    batch = f"{cost.batch_size * cost.accum_freq:,}{times}"
    add(f"per GPU ({cost.machine.gpus:,})", batch, "batch_size", "accum_freq")
    add("steps", f"{cost.steps:,}", "steps")
    add("warm-up steps", f"{cost.warmup_steps:,}", "warmup_steps")
    add("learning rate", f"{cost.lr:.2e}", "lr")
    add("precision", f"{cost.precision}{recomputed}", "precision", "grad_checkpointing")
    add("GFLOP per image", f"{flops / GFLOP:,.4g}", flop_per_image=flops, flop_per_image_by_part=parts)
    for name, part in parts.items():
        add(f"  of it {name}", f"{part / flops:.0%}")
    add("FLOP", f"{cost.total_flops:.2e}", flop=cost.total_flops)
    add("memory: weights and optimizer", f"{memory['fixed'] / GB:.1f} GB")
    add("memory: activations", f"{memory['activations'] / GB:,.1f} GB", memory_bytes=memory)
    add("images/s of all GPUs", f"{cost.images_per_second:,.0f}", "images_per_second")
    add(f"MFU, of {cost.machine.tflops:g} TFLOP/s per GPU", f"{cost.mfu:.0%}", utilisation=cost.mfu)
    add("time", _duration(cost.hours), "hours")
    add("GPU-hours", f"{gpu_hours:,.3g}" if gpu_hours < 100 else f"{gpu_hours:,.0f}", "gpu_hours")
    return cells, plain


def _duration(hours: float) -> str:
    return f"{60 * hours:.0f} minutes" if hours < 1 else f"{hours:,.1f} hours"


def _whole_run(plan: Plan) -> str:
    machine, hours = plan.machine, plan.hours
    how = f"from FLOPs at {machine.mfu:.0%} of {machine.tflops:g} TFLOP/s per GPU (an H100 reaches 790 in dense bf16)"
    if machine.images_per_second:
        how = "from the images per second given"
    gpus = "1 GPU" if machine.gpus == 1 else f"{machine.gpus:,} GPUs"
    spent = f"{hours * machine.gpus:,.4g} GPU-hours"
    return f"whole run: {plan.total_flops:.2e} FLOP, {_duration(hours)} on {gpus}, {spent}, {how}"


def _models(plan: Plan) -> dict[str, dict[str, Any]]:
    """FLOP of the model, which is first, and of its baselines: of an image in each stage, and of all samples."""
    flops = {plan.model: tuple(cost.flops_per_image for cost in plan.stages), **plan.baselines}
    samples = [cost.samples for cost in plan.stages]
    return {
        name: {"flop_per_image": each, "total_flop": sum(map(operator.mul, each, samples))}
        for name, each in flops.items()
    }


def _comparison(plan: Plan) -> list[list[str]]:
    rows = [["GFLOP per image", *(cost.images for cost in plan.stages), "whole run", "relative"]]
    for name, flop in _models(plan).items():
        total, images = flop["total_flop"], (f"{each / GFLOP:,.4g}" for each in flop["flop_per_image"])
        rows.append([name, *images, f"{total:.2e} FLOP", f"{total / plan.total_flops:.2f} x"])
    return rows


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain numbers: FLOP, bytes, hours."""
    machine = plan.machine
    return {
        "model": plan.model,
        "parameters": {**plan.parameters, "total": sum(plan.parameters.values())},
        "machine": {
            "gpus": machine.gpus,
            "tflops_per_gpu": machine.tflops,
            "utilisation_assumed": None if machine.images_per_second else machine.mfu,
            "memory_gb_per_gpu": machine.memory_gb,
        },
        "stages": [_figures(cost)[1] for cost in plan.stages],
        "total": {"flop": plan.total_flops, "hours": plan.hours, "gpu_hours": plan.hours * machine.gpus},
        "baselines": {name: flop for name, flop in _models(plan).items() if name in plan.baselines},
    }
