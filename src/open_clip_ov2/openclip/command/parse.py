"""argv -> RunPlan: for each stage our options (frozen), and the argv that OpenCLIP's own `main` gets."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from open_clip_train.distributed import world_info_from_env
from open_clip_train.params import parse_args as open_clip_parse_args

from open_clip_ov2.argv import is_given, to_argv, without
from open_clip_ov2.data.order.layout import Layout
from open_clip_ov2.errors import UserError, first_line, naming, nearest
from open_clip_ov2.openclip.command import flag_checks as checks
from open_clip_ov2.openclip.command.flags import RunOptions, ScheduleOptions, TrainOptions, build_parser, options
from open_clip_ov2.openclip.command.refusals import NEEDS, StageFlags, refuse
from open_clip_ov2.openclip.command.run_plan import RunPlan, StagePlan, run_config, signature
from open_clip_ov2.openclip.command.stage_flags import derived_flags, one_aug_cfg
from open_clip_ov2.openclip.models import factory
from open_clip_ov2.recipe import Recipe, Stage, load_recipe, parse_stage

SEED_STEP = 1_000_003  # between stages: far from the `seed + rank` that OpenCLIP seeds each process with


def parse(
    argv: Sequence[str], world_size: int | None = None, gpu: bool | None = None, *, needs_data: bool = True
) -> RunPlan:
    """The plan of a command line of `ov2 train`. `world_size` (processes) and `gpu` are what the run will have, by
    default this environment's; without `needs_data`, --train-data may be missing. Raises UserError."""
    gpu = torch.cuda.is_available() if gpu is None else gpu
    world_size = world_info_from_env()[2] if world_size is None else world_size
    schedule = options(ScheduleOptions, build_parser().parse_known_args(list(argv))[0])
    if schedule.recipe and schedule.stage:
        raise UserError("--recipe and --stage: give one or the other; a recipe's stages stand in its file")
    recipe = load_recipe(schedule.recipe) if schedule.recipe else None
    given = _stages(schedule, argv, recipe)
    parts = [_stage(flags, stage, index, world_size, gpu, needs_data) for index, (flags, stage) in enumerate(given)]
    refuse(NEEDS, [flags for flags, _ in parts])
    stages = [stage for _, stage in parts]
    ours, _ = build_parser().parse_known_args(given[0][0])  # with the flags of a recipe's [train]
    run, first = options(RunOptions, ours), stages[0].args
    checks.check_stages([stage.options for stage in stages], ours.carry_optimizer)
    config = run_config(stages, world_size, ours.carry_optimizer)
    checks.check_fsdp(run, stages, world_size)
    if run.until_stage and run.until_stage > len(stages):
        raise UserError(f"--until-stage {run.until_stage}: the run has {len(stages)} stages")
    name = _name(first, recipe, signature(config))
    if not (Path(first.logs) / name / "run.json").is_file():  # a run that exists has its own weights
        checks.check_pretrained(given[0][0], stages[0].options.tokenizer, first)
    return RunPlan(
        name=name,
        folder=Path(first.logs) / name,
        model=first.model,
        is_ov2=factory.is_ov2_model(first.model),
        stages=tuple(stages),
        carry_optimizer=ours.carry_optimizer,
        options=run,
        config=config,
        recipe=recipe,
        argv=tuple(argv),
    )


def _name(args: argparse.Namespace, recipe: Recipe | None, config_signature: str) -> str:
    """The run's name: --name, or model, recipe and signature."""
    stem = f"-{recipe.source.stem}" if recipe and recipe.source and recipe.source.stem != args.model else ""
    name: str = args.name or f"{args.model.replace('/', '-').replace(':', '-')}{stem}-{config_signature}"
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"--name {name}: leads out of --logs {args.logs}; set the folder with --logs")
    return name


def _stages(
    schedule: ScheduleOptions, argv: Sequence[str], recipe: Recipe | None
) -> list[tuple[list[str], Stage | None]]:
    """All flags of each stage, and the stage itself. Of two equal flags the later wins: argv over a file, --stage over
    the rest of argv."""
    mine = without(argv, ("--recipe", "--stage"))
    found: list[tuple[list[str], Stage | None]]
    if recipe is not None:
        common = to_argv({"model": recipe.model, **recipe.flags})
        found = [([*stage.added_to(common), *mine], stage) for stage in recipe.stages]
    elif schedule.stage:
        found = [(stage.added_to(mine), stage) for stage in map(parse_stage, schedule.stage)]
    else:
        return [(mine, None)]
    sized = any(stage.resolution for _, stage in found if stage)  # a model of tokens=N has its own size
    for flag in ("--epochs", "--train-num-samples", *(("--force-image-size",) if sized else ())):
        if is_given(mine, flag):
            raise UserError(f"{flag}: each stage has its own resolution and samples; leave the flag out")
    return found


def _stage(
    flags: list[str], stage: Stage | None, index: int, world_size: int, gpu: bool, needs_data: bool
) -> tuple[StageFlags, StagePlan]:
    title = stage.title if stage else ""
    flags = one_aug_cfg(flags)
    with naming(f"stage {index + 1} ({title})") if title else contextlib.nullcontext():
        ours, rest = build_parser().parse_known_args(flags)
        theirs = _parse_theirs(rest)
        if not is_given(flags, "--model"):
            raise UserError("ov2 train: --model is missing, for example --model ov2-vit-l-14")
        checks.check_model_name("--model", theirs.model)
        rest += derived_flags(flags, ours, theirs, world_size, gpu)
        if index:
            rest += ["--seed", str((theirs.seed + index * SEED_STEP) % 2**32)]
        theirs = _parse_theirs(rest)
        train = options(TrainOptions, ours)
        parsed = StageFlags(flags, train, theirs, gpu)
        checks.check_stage(parsed, needs_data)
        layout = Layout.of(train.elastic, theirs.batch_size, theirs.accum_freq, world_size, theirs.workers)
        if ours.eval and needs_data:
            checks.check_eval(ours.eval, theirs)
    summary = stage.described(theirs.batch_size * theirs.accum_freq * world_size, theirs.lr) if stage else ""
    precision_given = parsed.has("--precision")
    return parsed, StagePlan(index, title, summary, train, theirs, tuple(rest), precision_given, layout)


def _parse_theirs(argv: Sequence[str]) -> argparse.Namespace:
    """By OpenCLIP's own parser, which prints its whole usage and exits; the error is its last line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed = open_clip_parse_args(list(argv))
    except (ValueError, SyntaxError) as error:  # its reader of --aug-cfg lets these pass
        what = "expected KEY=VALUE ..., for example scale=(0.4,1.0) use_timm=True"
        raise UserError(f"--aug-cfg: {what} ({first_line(error)})") from None
    except SystemExit as error:
        if not error.code:  # --help
            raise
        message = printed.getvalue().rpartition("error: ")[2].strip()
        raise UserError(f"ov2 train: {message} (`ov2 train --help` lists the flags)") from None
    for word in argv:  # argparse would take an abbreviation, which nothing else here would recognize
        flag = word.split("=")[0]
        if flag.startswith("--") and flag[2:].replace("-", "_") not in vars(parsed):
            known = [f"--{name.replace('_', '-')}" for name in vars(parsed)]
            raise UserError(f"ov2 train: {flag}: write flags in full{nearest(flag, known)}")
    return parsed


def help_text() -> str:
    """Our flags, then OpenCLIP's."""
    ours = build_parser().format_help()
    captured = io.StringIO()
    with contextlib.redirect_stdout(captured), contextlib.suppress(SystemExit):
        open_clip_parse_args(["--help"])
    theirs = captured.getvalue()
    options = theirs[theirs.find("option") :]
    return f"usage: ov2 train --model MODEL --train-data SHARDS [flags]\n\n{ours}\nflags of OpenCLIP\n{options}"
