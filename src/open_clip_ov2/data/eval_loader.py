"""Batches for evaluation, in the main process.

Shapes: C channels, H and W pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from open_clip_ov2.data.captions import CaptionKey, all_captions, group_text
from open_clip_ov2.data.decode import MAX_IMAGE_PIXELS
from open_clip_ov2.data.receive import Receiver, torch_loader
from open_clip_ov2.data.samples import Decoder
from open_clip_ov2.data.skips import SkipCounter, SkipSample, nothing_usable
from open_clip_ov2.data.sources import Source
from open_clip_ov2.data.streams import Batch, EvalStream, Tokenizer


class Described(NamedTuple):
    """The text of a sample: `place` as in `Batch.indices`, all its captions, the value of the loader's `group_by`."""

    place: int
    key: str
    captions: tuple[str, ...]
    group: str


class EvalLoader(Receiver):
    """Every sample exactly once over all processes and workers, the first caption of each; the last batch is partial.

    File order, the workers in turns. `num_samples` stops after so many samples of the files, usable or not.
    Iterating gives this process's part; `full()` everything, for what runs on one process alone.
    Labeled sets need no captions: without `caption_keys` they are "", without a tokenizer `texts_BL` is `(B, 0)`.
    Raises UserError if the whole set has no usable sample, or a worker dies; `named`: what data it is, and its flag.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Any], Tensor],
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int,
        num_workers: int,
        caption_keys: tuple[CaptionKey, ...] = (),
        rank: int = 0,
        world_size: int = 1,
        num_samples: int | None = None,
        group_by: CaptionKey | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        prompt_keys: tuple[CaptionKey, ...] = (),
        pin_memory: bool = False,
        named: tuple[str, str] = ("validation", "--val-data"),
    ) -> None:
        super().__init__(num_workers)
        self._named = named
        decoder = Decoder(transform, caption_keys, max_image_pixels, prompt_keys)
        self._stream = EvalStream(source, decoder, tokenizer, batch_size, rank, world_size, num_samples, group_by)
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self.num_samples = num_samples or source.count() or 0

    def fingerprint(self) -> dict[str, str | int | None]:
        """Identifies samples and groups; tokenizer and transform have no name and are left out."""
        stream, decoder = self._stream, self._stream.decoder
        settings = {"limit": stream.limit, "group_by": str(stream.group_by), "caption_keys": str(decoder.caption_keys)}
        return {**stream.source.fingerprint(), **settings, "max_image_pixels": decoder.max_image_pixels}

    def described(self) -> Iterator[Described]:
        """Every sample of the whole set in file order, without decoding its picture, which may prove unusable."""
        stream, keys = self._stream, self._stream.decoder.caption_keys
        for index, raw in enumerate(islice(stream.source.in_order(SkipCounter(log=False)), stream.limit)):
            captions: tuple[str, ...] = ()
            with contextlib.suppress(SkipSample):
                captions = tuple(all_captions(raw, keys)) if keys else ()
            yield Described(index, raw["__key__"], captions, group_text(raw, stream.group_by))

    def __iter__(self) -> Iterator[Batch]:
        return self._batches(self._stream)

    def check(self) -> None:
        """Raises UserError if there is no usable sample; reads as far as the first, in this process."""
        self.reset_skips()
        if next(self.receive(self._one_by_one()), None) is None:
            raise nothing_usable(*self._named, self.skips, self.example)

    def full(self) -> Iterator[Batch]:
        return self._batches(replace(self._stream, rank=0, world_size=1))

    def _batches(self, stream: EvalStream) -> Iterator[Batch]:
        self.reset_skips()
        used = False
        for batch in self.receive(torch_loader(stream, self._num_workers, self._pin_memory, persistent=False)):
            used = True
            yield batch
        if not used and stream.world_size > 1:  # where this process has nothing usable, another one may
            used = any(isinstance(item, Batch) and item.keys for item in self._one_by_one())
        if not used:
            raise nothing_usable(*self._named, self.skips, self.example)

    def _one_by_one(self) -> EvalStream:
        return replace(self._stream, batch_size=1, rank=0, world_size=1)
