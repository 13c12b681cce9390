"""`ov2 bench data`: how many images a second each stage of the data pipeline makes on one core.

Shapes: C channels, H and W pixels, L caption tokens.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from open_clip_ov2.data.captions import choose_caption
from open_clip_ov2.data.loader import TrainLoader
from open_clip_ov2.data.samples import Decoder
from open_clip_ov2.data.skips import SkipSample
from open_clip_ov2.data.sources import Source
from open_clip_ov2.data.streams import Tokenizer
from open_clip_ov2.errors import UserError

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Stage:
    """`seconds` of an image. `part_of_sum`: whether the whole pipeline does this once for each image."""

    name: str
    seconds: float
    part_of_sum: bool = True


def stages(source: Source, decoder: Decoder, tokenizer: Tokenizer, *, samples: int, batch_size: int) -> list[Stage]:
    """Processor time of each stage alone over the same samples, in this process. Raises UserError if none is usable."""
    begin = time.process_time()
    raws = list(itertools.islice(_endless(source), samples))
    reading = time.process_time() - begin
    captions, captioning = _each(raws, lambda raw: choose_caption(raw, decoder.caption_keys, random.Random(0)))
    _, whole = _each(raws, decoder.image)
    made, decoding = _each(raws, lambda raw: decoder.train(raw, seed=0))
    if not made:
        raise UserError("none of the samples can be used; `ov2 train` counts why")
    images = [image_CHW for image_CHW, _ in made]
    _, tokenizing = _each(_chunks(captions, batch_size), lambda chunk: tokenizer(list(chunk)))
    _, collating = _each(_chunks(images, batch_size), lambda chunk: torch.stack(list(chunk)))
    return [
        Stage("read", reading / len(raws)),
        Stage("choose a caption", captioning / len(raws)),
        Stage("decode, crop, transform", max(0.0, decoding - captioning) / len(raws)),
        Stage("  for comparison: decode the whole picture", whole / len(raws), part_of_sum=False),
        Stage("tokenize", tokenizing / len(captions)),
        Stage("collate", collating / len(images)),
    ]


def _endless(source: Source) -> Iterator[dict[str, Any]]:
    """Samples in the order of the files, again and again. Raises UserError if there are none."""
    while True:
        found = False
        for raw in source.in_order():
            found = True
            yield raw
        if not found:
            raise UserError("--train-data: it has no samples")


def _each(items: Sequence[Item], make: Callable[[Item], Made]) -> tuple[list[Made], float]:
    """What was made of the usable items, and the processor seconds for all of them."""
    made: list[Made] = []
    begin = time.process_time()
    for item in items:
        try:
            made.append(make(item))
        except SkipSample:
            continue
    return made, time.process_time() - begin


def _chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def loader_speed(loader: TrainLoader, workers: int, samples: int) -> float:
    """Images per second by the clock, after the batches that the workers had ready at the beginning."""
    batches = iter(loader)
    for _ in range(1 + 2 * workers):  # torch keeps two batches a worker ahead
        next(batches)
    seen, begin = 0, time.perf_counter()
    while seen < samples:
        seen += len(next(batches).keys)
    return seen / (time.perf_counter() - begin)


def pipeline_table(found: Sequence[Stage], loaders: Sequence[tuple[int, float]]) -> str:
    """Markdown. `loaders`: (workers, images per second)."""
    total = sum(stage.seconds for stage in found if stage.part_of_sum)
    lines = ["| one process | ms an image | images/s | share |", "| --- | --- | --- | --- |"]
    for stage in found:
        share = f"{stage.seconds / total:.0%}" if stage.part_of_sum else ""
        rate = 1 / max(stage.seconds, 1e-12)
        lines.append(f"| {stage.name} | {1e3 * stage.seconds:.3f} | {rate:,.0f} | {share} |")
    lines.append(f"| all of them | {1e3 * total:.3f} | {1 / total:,.0f} | |")
    lines += ["", "| whole loader | images/s | a process |", "| --- | --- | --- |"]
    for workers, speed in loaders:
        name = f"--workers {workers}" if workers else "in the main process"
        lines.append(f"| {name} | {speed:,.0f} | {speed / max(1, workers):,.0f} |")
    return "\n".join(lines)
