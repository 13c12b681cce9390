"""`ov2 bench data`: how many images a second each stage of the data pipeline makes on one core.

Shapes: C channels, H and W pixels.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from open_clip_ov2.data.captions import choose_caption
from open_clip_ov2.data.loader import TrainLoader
from open_clip_ov2.data.skips import SkipSample
from open_clip_ov2.data.streams import TrainStream
from open_clip_ov2.errors import UserError
from open_clip_ov2.tracking.text_table import markdown


def stages(stream: TrainStream, samples: int) -> dict[str, float]:
    """Processor seconds of an image in each stage alone, over the same samples. Raises UserError if none is usable."""
    decoder, batch_size = stream.decoder, stream.layout.batch_size
    begin = time.process_time()
    raws = list(itertools.islice(stream.source.in_order(), samples))
    reading = time.process_time() - begin
    captions, captioning = _timed(raws, lambda raw: choose_caption(raw, decoder.caption_keys, random.Random(0)))
    made, decoding = _timed(raws, lambda raw: decoder.train(raw, seed=0))
    if not made:
        raise UserError("--train-data: none of its samples can be used; `ov2 train` counts why")
    batches = [made[first : first + batch_size] for first in range(0, len(made), batch_size)]
    texts = [captions[first : first + batch_size] for first in range(0, len(captions), batch_size)]
    _, tokenizing = _timed(texts, stream.tokenizer)
    _, collating = _timed(batches, lambda batch: torch.stack([image_CHW for image_CHW, _ in batch]))
    return {
        "read": reading / len(raws),
        "choose a caption": captioning / len(raws),
        "decode, crop, transform": max(0.0, decoding - captioning) / len(raws),
        "tokenize": tokenizing / len(captions),
        "collate": collating / len(made),
    }


def _timed(items: Sequence[Any], make: Callable[[Any], Any]) -> tuple[list[Any], float]:
    """What was made of the usable items, and the processor seconds for all of them."""
    made: list[Any] = []
    begin = time.process_time()
    for item in items:
        with contextlib.suppress(SkipSample):
            made.append(make(item))
    return made, time.process_time() - begin


def loader_speed(loader: TrainLoader, workers: int, samples: int) -> float:
    """Images per second by the clock, after the batches that the workers had ready at the beginning."""
    batches = iter(loader)
    for _ in range(1 + 2 * workers):  # torch keeps two batches a worker ahead
        next(batches)
    seen, begin = 0, time.perf_counter()
    while seen < samples:
        seen += len(next(batches).keys)
    return seen / (time.perf_counter() - begin)


def pipeline_table(found: Mapping[str, float], loaders: Sequence[tuple[int, float]]) -> str:
    """Markdown. `found`: seconds of an image by stage; `loaders`: (workers, images per second)."""
    total = sum(found.values())
    parts = [["one process", "ms an image", "images/s", "share"]]
    for name, seconds in {**found, "all of them": total}.items():
        parts.append([name, f"{1e3 * seconds:.3f}", f"{1 / max(seconds, 1e-12):,.0f}", f"{seconds / total:.0%}"])
    whole = [["whole loader", "images/s", "a process"]]
    for workers, speed in loaders:
        name = f"--workers {workers}" if workers else "in the main process"
        whole.append([name, f"{speed:,.0f}", f"{speed / max(1, workers):,.0f}"])
    return f"{markdown(parts)}\n\n{markdown(whole)}"
