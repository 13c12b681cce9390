"""The flags of `ov2 captions write`, each declared once, and what they make."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import Parser, add_flags, flag, flag_values, switch_flag
from open_clip_ov2.captions.engine_hub import TransformersEngine, VllmEngine
from open_clip_ov2.captions.engine_ov2 import Ov2Engine
from open_clip_ov2.captions.engines import Prompts, Sampler, read_sampler
from open_clip_ov2.captions.tars_of import note_shards
from open_clip_ov2.captions.write import Task, Writing, read_task, standing, task_here
from open_clip_ov2.data.captions import CaptionKey, parse_caption_keys
from open_clip_ov2.data.decode import MAX_IMAGE_PIXELS
from open_clip_ov2.data.shards import expand_shards
from open_clip_ov2.data.sidecars import begin_set
from open_clip_ov2.errors import UserError
from open_clip_ov2.tables import one_of, text, whole

logger = logging.getLogger(__name__)
# CLASS(model, device, max_tokens, image_size) is an `Engine`. A class has what stands where no flag says otherwise:
# `batch_size`, and prompts `with_text`, which has `{text}` in it, and `without`.
ENGINES: dict[str, Any] = {"ov2": Ov2Engine, "transformers": TransformersEngine, "vllm": VllmEngine}


@dataclass(frozen=True)
class WriteOptions:
    """What is written, with what model, and by which process. `shards`: tars, as for --train-data; `out`: the set."""

    shards: str
    out: Path
    model: str | None = flag(
        "MODEL",
        text,
        "a run of ours, a checkpoint, NAME:TAG, or a model of the hub such as llava-hf/llava-1.5-7b-hf (default: the "
        "model that the package holds)",
    )
    engine: str | None = flag(
        "|".join(ENGINES), one_of(*ENGINES), "what runs the model (default: ov2 for ours, transformers for the hub's)"
    )
    condition: tuple[CaptionKey, ...] = flag(
        "KEY,...", parse_caption_keys, "texts to give the model with each picture: txt, json:title (default: none)",
        default=(),
    )  # fmt: skip
    prompt: str | None = flag(
        "TEXT",
        text,
        "the prompt, with {text} where those texts go, {json:title} for one of them (default: the engine's; for ours "
        "'{text} :')",
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
    seed: int = flag("N", whole(0), "of the sampling", default=0)
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
    max_image_pixels: int = flag("N", whole(1), "no caption of pictures with more pixels", default=MAX_IMAGE_PIXELS)
    device: str | None = flag("NAME", text, "cpu, cuda, cuda:1, mps (default: cuda if there is a GPU, otherwise cpu)")
    workers: int = flag("N", whole(1), "threads that decode pictures", default=4)
    task: Task | None = flag(
        "T/N", read_task, "write every Nth shard from the Tth on, from 0 (default: as SLURM or torchrun say; else all)"
    )
    status: bool = switch_flag("show how many shards are finished, and write nothing")

    @property
    def urls(self) -> tuple[str, ...]:
        """Raises UserError: tars that do not exist."""
        return expand_shards(self.shards)[0]


def add_write_flags(parser: Any) -> None:
    parser.add_argument(
        "shards", nargs="+", metavar="IN", help="tars, as for ov2 train --train-data: braces, ::, pipe:"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the caption set")
    add_flags(parser, WriteOptions)


def parsed_write(args: argparse.Namespace) -> WriteOptions:
    return WriteOptions("::".join(args.shards), args.out, **flag_values(WriteOptions, args))


def parse_write(argv: Sequence[str]) -> WriteOptions:
    """From what stands after `ov2 captions write`. Raises UserError."""
    parser = Parser(prog="ov2 captions write")
    add_write_flags(parser)
    return parsed_write(parser.parse_args(argv))


def write_set(options: WriteOptions, wrote: Callable[[int], None] = lambda _: None) -> str:
    """Write what is missing, or show where the set stands; returns lines to print. `wrote`: of Writing. Raises
    UserError, Interrupted."""
    urls, out = options.urls, options.out
    logging.basicConfig(format="ov2: %(message)s")
    logging.getLogger("open_clip_ov2.captions").setLevel(logging.INFO)
    if options.status:
        return standing(urls, out)
    if options.prompt and not options.condition:
        raise UserError("--prompt is for the text of --condition; without one give --prompt-without")
    kind = options.engine or ("ov2" if options.model is None or _is_ours(options.model) else "transformers")
    if options.model is None and kind != "ov2":
        raise UserError(f"--engine {kind}: name its model with --model, for example llava-hf/llava-1.5-7b-hf")
    if options.condition and options.model is None:
        logger.warning(
            "--condition: the package's own model was trained without prompts, so text may make its captions worse; "
            "leave the flag out, or name a --model that was trained with --prompt-keys"
        )
    defaults = ENGINES[kind]
    without = defaults.without if options.prompt_without is None else options.prompt_without
    prompts = Prompts(options.condition, options.prompt or defaults.with_text, without)
    writing = Writing(
        engine=defaults(options.model, options.device, options.max_tokens, options.image_size),
        prompts=prompts,
        samplers=tuple(options.sampling or (Sampler(),)),
        seed=options.seed,
        batch_size=options.batch_size or defaults.batch_size,
        max_image_pixels=options.max_image_pixels,
        workers=options.workers,
        wrote=wrote,
    )
    begin_set(out, _settings(kind, writing, options))
    note_shards(out, options.shards)
    writing.write(urls, out, options.task or task_here())
    return standing(urls, out)


def _is_ours(model: str) -> bool:
    """A run, a checkpoint, an exported folder or NAME:TAG of OpenCLIP's registry."""
    path = Path(model)
    if path.is_dir():
        return (path / "open_clip_config.json").is_file() or not (path / "config.json").is_file()
    return path.is_file() or ":" in model


def _settings(kind: str, writing: Writing, options: WriteOptions) -> dict[str, Any]:
    """What the captions of a set depend on, JSON-ready."""
    model, prompts = writing.engine.model, writing.prompts
    return {
        "made_by": "ov2 captions write",
        "engine": kind,
        "model": str(Path(model).absolute()) if os.path.exists(model) else model,
        "condition": ",".join(map(str, prompts.condition)) or None,
        "prompt": prompts.template if prompts.condition else None,
        "prompt_without": prompts.without,
        "sampling": [vars(one) for one in writing.samplers],
        "seed": writing.seed,
        "max_tokens": options.max_tokens,
        "batch_size": writing.batch_size,
        "image_size": options.image_size,
        "max_image_pixels": writing.max_image_pixels,
    }
