"""The flags of `ov2 captions write`, each declared once, and what they make."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from open_clip_ov2.argv import Parser, add_flags, flag, flag_values, switch_flag
from open_clip_ov2.captions.engines import ENGINES, OV2, TRANSFORMERS, Defaults, Engine, engine_of
from open_clip_ov2.captions.requests import Prompts, Sampler, read_condition, read_sampler
from open_clip_ov2.captions.shards_of import note_shards
from open_clip_ov2.captions.write import Task, Writing, standing, task_here, write_captions
from open_clip_ov2.data.captions import CaptionKey
from open_clip_ov2.data.decode import MAX_IMAGE_PIXELS
from open_clip_ov2.data.shards import expand_shards
from open_clip_ov2.data.sidecars import begin_set
from open_clip_ov2.errors import UserError
from open_clip_ov2.tables import one_of, text, whole


def read_task(value: str) -> Task:
    """`0/4` to `3/4`. Raises UserError."""
    index, slash, count = value.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"{value!r}: expected T/N, for example 0/4 to 3/4 for four processes")
    return Task(int(index), int(count))


@dataclass(frozen=True)
class WriteOptions:
    """What is written, with what model, and by which process."""

    model: str | None = flag(
        "MODEL",
        text,
        "a run of ours, a checkpoint, NAME:TAG, or a model of the hub such as llava-hf/llava-1.5-7b-hf (default: the "
        "model that the package holds)",
    )
    engine: str | None = flag(
        "|".join(ENGINES), one_of(*ENGINES), "what runs the model (default: ov2 for ours, transformers for the hub's)"
    )
    condition: CaptionKey | None = flag(
        "KEY", read_condition, "text to give the model with each picture: txt, json:title (default: none)"
    )
    prompt: str | None = flag(
        "TEXT", text, "the prompt, with {text} where that text goes (default: the engine's; for ours '{text} :')"
    )
    prompt_without: str | None = flag(
        "TEXT", str, "the prompt where there is no text (default: the engine's; for ours none)"
    )
    sampling: list[Sampler] | None = flag(
        "greedy|top-k=K,temperature=T",
        read_sampler,
        "how tokens are chosen; repeatable, with weight=W: one is drawn for each caption (default: greedy)",
        repeat=True,
    )
    seed: int = flag("N", whole(0), "of the sampling (default: 0)", default=0)
    max_tokens: int | None = flag(
        "N", whole(1), "longest caption in tokens (default: 128; for ours what the context leaves)"
    )
    batch_size: int | None = flag(
        "N", whole(1), "pictures at a time (default: 32 for ours, 16 for transformers, 1000 for vllm)"
    )
    image_size: int | None = flag(
        "PX",
        whole(1),
        "reduce pictures to this short side before the model's own processor gets them (default for vllm: the size of "
        "the processor; else: as they are)",
    )
    max_image_pixels: int = flag(
        "N",
        whole(1),
        f"no caption of pictures with more pixels (default: {MAX_IMAGE_PIXELS})",
        default=MAX_IMAGE_PIXELS,
    )
    device: str | None = flag("NAME", text, "cpu, cuda, cuda:1, mps (default: cuda if there is a GPU, otherwise cpu)")
    workers: int = flag("N", whole(1), "threads that decode pictures (default: 4)", default=4)
    task: Task | None = flag(
        "T/N", read_task, "write every Nth shard from the Tth on, from 0 (default: as SLURM or torchrun say; else all)"
    )
    status: bool = switch_flag("show how many shards are finished, and write nothing")


class Parsed(NamedTuple):
    """A command line. `shards` is what the user wrote for `urls`."""

    urls: tuple[str, ...]
    shards: str
    out: Path
    options: WriteOptions


def add_write_flags(parser: Any) -> None:
    parser.add_argument(
        "shards", nargs="+", metavar="IN", help="tars, as for ov2 train --train-data: braces, ::, pipe:"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the caption set")
    add_flags(parser, WriteOptions)


def parsed_write(args: argparse.Namespace) -> Parsed:
    """Raises UserError: tars that do not exist."""
    shards = "::".join(args.shards)
    return Parsed(expand_shards(shards)[0], shards, args.out, WriteOptions(**flag_values(WriteOptions, args)))


def parse_write(argv: Sequence[str]) -> Parsed:
    """From what stands after `ov2 captions write`. Raises UserError."""
    parser = Parser(prog="ov2 captions write")
    add_write_flags(parser)
    return parsed_write(parser.parse_args(argv))


def run_parsed(parsed: Parsed, task: Task | None = None, wrote: Callable[[int], None] = lambda _: None) -> str:
    """Write what is missing, or show where the set stands; returns lines to print. Raises UserError, Interrupted.

    `task`: the part of this process, where the command line names none; `wrote` as for `write_captions`.
    """
    urls, shards, out, options = parsed
    logging.basicConfig(format="ov2: %(message)s")
    logging.getLogger("open_clip_ov2.captions").setLevel(logging.INFO)
    if options.status:
        return standing(urls, out)
    kind = engine_of(options.engine, options.model)
    if options.image_size is not None and kind == OV2:
        raise UserError("--image-size is for models of the hub; ours see pictures at their own size")
    defaults = _defaults(kind)
    samplers = tuple(options.sampling or (Sampler(),))
    condition = options.condition
    prompts = Prompts(
        condition,
        options.prompt or defaults.with_text,
        defaults.without if options.prompt_without is None else options.prompt_without,
    )
    if options.prompt and condition is None:
        raise UserError("--prompt is for the text of --condition; without one give --prompt-without")
    engine = _open(kind, options)
    batch_size = options.batch_size or defaults.batch_size
    begin_set(out, _settings(kind, engine, prompts, samplers, batch_size, options))
    note_shards(out, shards)
    task = options.task or task_here()
    write_captions(
        urls, out, task,
        Writing(engine, prompts, samplers, options.seed, batch_size, options.max_image_pixels, options.workers),
        wrote,
    )  # fmt: skip
    return standing(urls, out)


def _settings(
    kind: str, engine: Engine, prompts: Prompts, samplers: tuple[Sampler, ...], batch_size: int, options: WriteOptions
) -> dict[str, Any]:
    """What the captions of a set depend on, JSON-ready."""
    local = os.path.exists(engine.model)
    return {
        "made_by": "ov2 captions write",
        "engine": kind,
        "model": str(Path(engine.model).absolute()) if local else engine.model,
        "condition": str(prompts.condition) if prompts.condition else None,
        "prompt": prompts.template if prompts.condition else None,
        "prompt_without": prompts.without,
        "sampling": [vars(one) for one in samplers],
        "seed": options.seed,
        "max_tokens": options.max_tokens,
        "batch_size": batch_size,
        "image_size": options.image_size,
        "max_image_pixels": options.max_image_pixels,
    }


def _defaults(kind: str) -> Defaults:
    from open_clip_ov2.captions import engine_ov2, engine_transformers, engine_vllm

    modules: dict[str, Any] = {OV2: engine_ov2, TRANSFORMERS: engine_transformers}
    found: Defaults = modules.get(kind, engine_vllm).DEFAULTS
    return found


def _open(kind: str, options: WriteOptions) -> Engine:
    if kind == OV2:
        from open_clip_ov2.captions.engine_ov2 import Ov2Engine

        return Ov2Engine(options.model, options.device, options.max_tokens)
    assert options.model is not None
    if kind == TRANSFORMERS:
        from open_clip_ov2.captions.engine_transformers import TransformersEngine

        return TransformersEngine(options.model, options.device, options.max_tokens, options.image_size)
    from open_clip_ov2.captions.engine_vllm import VllmEngine

    return VllmEngine(options.model, options.max_tokens, options.image_size)
