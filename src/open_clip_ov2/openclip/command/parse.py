"""argv -> RunPlan: for each stage our options (frozen), and the argv that OpenCLIP's own `main` gets."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

import torch
from open_clip_train.distributed import world_info_from_env
from open_clip_train.params import parse_args as open_clip_parse_args

from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.command.flag_checks import check_eval, check_stage
from open_clip_ov2.openclip.command.flags import build_parser, run_options, train_options
from open_clip_ov2.openclip.command.run_config import run_config, signature
from open_clip_ov2.openclip.command.run_plan import RunPlan, StagePlan
from open_clip_ov2.openclip.command.stage_flags import (
    derived_words,
    given,
    one_aug_cfg,
    recipe_words,
    stage_words,
    without,
)
from open_clip_ov2.openclip.models import factory
from open_clip_ov2.recipe import Recipe, Stage, load_recipe, parse_stage

SEED_STEP = 1_000_003  # between stages: far from the `seed + rank` that OpenCLIP seeds each process with


def parse(argv: Sequence[str], world_size: int | None = None, gpu: bool | None = None) -> RunPlan:
    """`world_size` (processes) and `gpu`: what the run will have, by default this environment's. Raises UserError."""
    gpu = torch.cuda.is_available() if gpu is None else gpu
    world_size = world_info_from_env()[2] if world_size is None else world_size
    ours, _ = build_parser().parse_known_args(list(argv))
    if ours.recipe and ours.stage:
        raise UserError("--recipe and --stage: one or the other; a recipe's stages stand in its file")
    recipe = load_recipe(ours.recipe) if ours.recipe else None
    said = _stages(ours, argv, recipe)
    stages = [_stage(words, stage, index, world_size, gpu) for index, (words, stage) in enumerate(said)]
    ours, _ = build_parser().parse_known_args(said[0][0])  # with what a recipe's [train] says of the whole run
    first = stages[0].args
    config = run_config(stages, world_size, ours.carry_optimizer)
    stem = f"-{recipe.source.stem}" if recipe and recipe.source and recipe.source.stem != first.model else ""
    name = first.name or f"{first.model.replace('/', '-').replace(':', '-')}{stem}-{signature(config)}"
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"--name {name}: leads out of --logs {first.logs}; say the folder by --logs")
    if ours.until_stage and ours.until_stage > len(stages):
        raise UserError(f"--until-stage {ours.until_stage}: there are {len(stages)} stages")
    return RunPlan(
        name=name,
        folder=Path(first.logs) / name,
        model=first.model,
        is_ov2=factory.is_ov2_model(first.model),
        stages=tuple(stages),
        carry_optimizer=ours.carry_optimizer,
        options=run_options(ours),
        config=config,
        recipe=recipe,
        argv=tuple(argv),
    )


def _stages(
    ours: argparse.Namespace, argv: Sequence[str], recipe: Recipe | None
) -> list[tuple[list[str], Stage | None]]:
    """All flags of each stage, and what was said of it.

    Of two equal flags the later wins: argv over a file, --stage over the rest of argv.
    """
    mine = without(argv, ("--recipe", "--stage"))
    if recipe is not None:
        stages, common = recipe.stages, recipe_words(recipe)
        words = [common + stage_words(stage) + mine for stage in stages]
    elif ours.stage:
        stages = tuple(parse_stage(text) for text in ours.stage)
        words = [mine + stage_words(stage) for stage in stages]
    else:
        return [(mine, None)]
    for flag in ("--epochs", "--train-num-samples", "--force-image-size"):
        if given(mine, flag):
            raise UserError(f"{flag}: a stage says its resolution and samples itself; leave the flag out")
    return list(zip(words, stages, strict=True))


def _stage(words: list[str], said: Stage | None, index: int, world_size: int, gpu: bool) -> StagePlan:
    title = said.name or f"{said.resolution} px" if said else ""
    words = one_aug_cfg(words)
    ours, rest = build_parser().parse_known_args(words)
    theirs = _parse_theirs(rest)
    _check_model_name(theirs.model, given(words, "--model"))
    try:
        rest += derived_words(words, ours, theirs, world_size, gpu)
    except UserError as error:
        raise UserError(f"stage {index + 1} ({title}): {error}" if title else str(error)) from None
    if index:
        rest += ["--seed", str(theirs.seed + index * SEED_STEP)]
    theirs = _parse_theirs(rest)
    options = train_options(ours)
    check_stage(options, theirs, gpu)
    if ours.eval_every_samples and not ours.eval:
        raise UserError("--eval-every-samples: there are no tasks; say them by --eval '--tasks ...'")
    if ours.eval:
        check_eval(ours.eval, theirs)
    summary = said.described(theirs.batch_size * theirs.accum_freq * world_size) if said else ""
    return StagePlan(index, title, summary, options, theirs, tuple(rest), given(words, "--precision"))


def _parse_theirs(words: Sequence[str]) -> argparse.Namespace:
    with _one_line_errors():
        parsed = open_clip_parse_args(list(words))
    for word in words:  # argparse would take an abbreviation, which nothing else here would recognise
        flag = word.split("=")[0]
        if flag.startswith("--") and flag[2:].replace("-", "_") not in vars(parsed):
            near = get_close_matches(flag[2:].replace("-", "_"), vars(parsed), n=1, cutoff=0.0)
            raise UserError(f"ov2 train: {flag}: flags are written out (near: --{near[0].replace('_', '-')})")
    return parsed


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """OpenCLIP's parser prints its whole usage and exits; we want the last line, as a UserError."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            yield
    except SystemExit as error:
        if not error.code:
            raise
        message = captured.getvalue().strip().splitlines()[-1:] or ["bad arguments"]
        text = message[0].split("error: ", 1)[-1]
        raise UserError(f"ov2 train: {text} (`ov2 train --help` lists the flags)") from None


def _check_model_name(name: str, was_given: bool) -> None:
    if not was_given:
        raise UserError("ov2 train: --model is missing, for example --model ov2-vit-l-14")
    if ":" in name:
        try:
            factory.is_ov2_model(name)
        except (
            Exception
        ) as error:  # whatever a folder that is none, or a hub that cannot be reached, makes upstream raise
            raise UserError(f"--model {name}: its config cannot be had ({str(error).splitlines()[0]})") from error
        return
    if name in factory.known_models():
        return
    near = get_close_matches(name, factory.known_models(), n=3, cutoff=0.5)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise UserError(f"--model {name}: no such model{hint} (open_clip.list_models() lists them)")


def help_text() -> str:
    """Our flags, then OpenCLIP's."""
    ours = build_parser().format_help()
    captured = io.StringIO()
    with contextlib.redirect_stdout(captured), contextlib.suppress(SystemExit):
        open_clip_parse_args(["--help"])
    theirs = captured.getvalue()
    options = theirs[theirs.find("option") :]
    return f"usage: ov2 train --model MODEL --train-data SHARDS [flags]\n\n{ours}\nflags of OpenCLIP\n{options}"
