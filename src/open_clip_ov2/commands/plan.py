"""`ov2 plan`: what a recipe will do, before a GPU is asked for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import Parser
from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe import Recipe, Stage, load_recipe, parse_stage
from open_clip_ov2.recipe import costs as planning
from open_clip_ov2.recipe.costs import Machine, Plan
from open_clip_ov2.recipe.flops import CaptionSizes
from open_clip_ov2.recipe.keys import read_values

# Flags of `ov2 train` that a plan depends on and takes too; the first ones are a stage's own.
STAGE_FLAGS = ("global_batch", "batch_size", "keep_ratio", "precision", "grad_checkpointing", "context_length")
TRAIN_FLAGS = ("accum_freq", "tokenizer", "fusion", "mean_caption_tokens")


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    plan = make_plan(_recipe(args), _machine(args))
    from open_clip_ov2.commands.plan_report import as_json, show

    if args.json:
        print(json.dumps(as_json(plan), indent=2))
    else:
        show(plan)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ov2 plan", description="What a recipe will do: tokens, steps, FLOPs, memory, hours.", allow_abbrev=False
    )
    add = parser.add_argument
    add("recipe", nargs="?", type=Path, metavar="RECIPE", help="a recipe file; flags given here override it")
    add("--model", metavar="NAME", help="with --stage, in place of a recipe")
    add("--stage", action="append", metavar="PX:samples=N,KEY=VALUE,...", help="as for ov2 train, repeatable")
    add("--json", action="store_true", help="everything as JSON")
    machine = parser.add_argument_group("machine").add_argument
    machine("--gpus", type=_positive(int), default=1, metavar="N", help="default: 1")
    machine("--images-per-second", metavar="X[,Y,...]", help="measured, of ONE GPU: for all stages, or one each")
    machine(
        "--device-tflops", type=_positive(float), default=planning.H100_TFLOPS, metavar="T",
        help="dense ceiling of one GPU (default: %(default)g, bf16, measured on an H100)",
    )  # fmt: skip
    machine(
        "--utilisation", type=_positive(float), default=planning.UTILISATION, metavar="U",
        help="share of that ceiling, where no images per second are given (default: %(default)g)",
    )  # fmt: skip
    machine("--gpu-memory-gb", type=_positive(float), default=planning.H100_MEMORY_GB, metavar="G", help="default: 80")
    run = parser.add_argument_group("flags of ov2 train, for all stages").add_argument
    run("--global-batch", metavar="N")
    run("--batch-size", metavar="N", help="the most images at once on a GPU")
    run("--accum-freq", type=_positive(int), metavar="N")
    run("--keep-ratio", metavar="R|LOW:HIGH")
    run("--precision", metavar="P")
    run("--grad-checkpointing", action="store_true", default=None)
    run("--context-length", metavar="N", help="--force-context-length of ov2 train")
    run("--tokenizer", metavar="NAME|FOLDER")
    run("--fusion", metavar="F")
    run(
        "--mean-caption-tokens", type=_positive(float), metavar="M",
        help="real tokens of a caption, end of text included; an ov2 model computes little else (default: all)",
    )  # fmt: skip
    return parser


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
        return value

    return parse


def _machine(args: argparse.Namespace) -> Machine:
    if args.utilisation > 1:
        raise UserError(f"--utilisation {args.utilisation:g}: a share of the ceiling, at most 1")
    speeds: tuple[float, ...] = ()
    if args.images_per_second is not None:
        try:
            speeds = tuple(_positive(float)(text) for text in args.images_per_second.split(","))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--images-per-second: {error}") from None
    return Machine(args.gpus, args.device_tflops, args.utilisation, args.gpu_memory_gb, speeds)


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe, with the flags given folded in."""
    if args.recipe and args.stage:
        raise UserError("RECIPE and --stage: one or the other; a recipe's stages stand in its file")
    if not args.recipe and not args.stage:
        raise UserError("ov2 plan: give a recipe file, or --model NAME --stage PX:samples=N,...")
    if args.recipe:
        recipe = load_recipe(args.recipe)
    else:
        recipe = Recipe(None, {}, tuple(parse_stage(text) for text in args.stage))
    if not (args.model or recipe.model):
        raise UserError("ov2 plan: --model is missing, for example --model ov2-vit-l-14")
    given = {key: value for key in STAGE_FLAGS if (value := getattr(args, key)) is not None}
    changes = {key.replace("-", "_"): value for key, value in read_values("ov2 plan", given.items()).items()}
    flags = {key.replace("_", "-"): value for key in TRAIN_FLAGS if (value := getattr(args, key)) is not None}
    stages = tuple(replace(stage, **changes) for stage in recipe.stages)
    return replace(recipe, model=args.model or recipe.model, flags={**recipe.flags, **flags}, stages=stages)


def make_plan(recipe: Recipe, machine: Machine) -> Plan:
    """Raises UserError."""
    from open_clip_ov2.openclip.models.model_facts import model_facts

    costs, others = [], {}
    for index, stage in enumerate(recipe.stages):
        facts = model_facts(
            str(recipe.model),
            resolution=stage.resolution,
            context_length=_context_length(stage, recipe),
            tokenizer=_text(recipe, "tokenizer"),
            fusion=_text(recipe, "fusion"),
        )
        settings = planning.resolve(stage, recipe.flags, machine.gpus, **facts.settings())
        speed = machine.speed(index, len(recipe.stages))
        costs.append(planning.stage_cost(stage, settings, facts.sizes, facts.trained, facts.frozen, machine, speed))
    if isinstance(facts.sizes, CaptionSizes):
        others = {
            name: tuple(planning.baseline_flops(sizes, cost) for cost in costs)
            for name, sizes in planning.baselines(facts.sizes).items()
        }
    return Plan(facts.name, facts.parameters, tuple(costs), others, machine)


def _text(recipe: Recipe, flag: str) -> str | None:
    return str(recipe.flags[flag]) if flag in recipe.flags else None


def _context_length(stage: Stage, recipe: Recipe) -> int | None:
    flag = recipe.flags.get("force-context-length")
    return stage.context_length if stage.context_length is not None or flag is None else int(str(flag))
