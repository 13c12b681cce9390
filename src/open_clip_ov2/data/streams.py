"""What runs inside a data worker: batches of its part of the data, or the reason why there are none.

Shapes: B batch, C channels, H and W pixels, L caption tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from open_clip_ov2.data.captions import CaptionKey
from open_clip_ov2.data.samples import Decoder, group_of, sample_seed
from open_clip_ov2.data.skips import SkipCounter, SkipSample, describe
from open_clip_ov2.data.sources import Share, Source

Tokenizer = Callable[[list[str]], Tensor]
TOKENIZER_FAILED = "tokenizer failed"
# A consumer that has found nothing usable gives up after a whole pass, or after this long and this many skips.
HOPELESS_S = 30.0
HOPELESS_SKIPS = 100


class Batch(NamedTuple):
    """`images_BCHW` from the transform, `texts_BL` int64; `skipped` since this worker's last batch, by cause."""

    images_BCHW: Tensor
    texts_BL: Tensor
    keys: list[str]
    captions: list[str]
    groups: list[str]
    skipped: dict[str, int]


class Failure(NamedTuple):
    """A UserError on its way out of a data worker, where torch would wrap it in a traceback."""

    message: str


class Tail(NamedTuple):
    """Skips after a worker's last batch."""

    skipped: dict[str, int]


class _Collector:
    """Decoded samples until a batch is full."""

    def __init__(self, tokenizer: Tokenizer, skips: SkipCounter, group_by: CaptionKey | None = None) -> None:
        self._tokenizer, self._skips, self._group_by = tokenizer, skips, group_by
        self._rows: list[tuple[Tensor, Tensor, str, str, str]] = []

    def add(self, raw: dict[str, Any], decode: Callable[[], tuple[Tensor, str]]) -> bool:
        """Whether the sample could be used."""
        try:
            image, caption = decode()
            ids = self._tokenize(caption)
        except SkipSample as error:
            self._skips.add(error.cause, error.detail, raw["__key__"], raw["__url__"])
            return False
        self._rows.append((image, ids, raw["__key__"], caption, group_of(raw, self._group_by)))
        return True

    def _tokenize(self, caption: str) -> Tensor:
        try:
            return self._tokenizer([caption])[0]
        except Exception as error:  # one caption must not end a run
            raise SkipSample(TOKENIZER_FAILED, f"{type(error).__name__}: {error}") from error

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self) -> Batch:
        images, texts, keys, captions, groups = zip(*self._rows, strict=True)
        self._rows = []
        skipped = self._skips.take()
        return Batch(torch.stack(images), torch.stack(texts), list(keys), list(captions), list(groups), skipped)


@dataclass
class TrainStream(IterableDataset[Any]):
    """One worker's batches of one epoch."""

    source: Source
    decoder: Decoder
    tokenizer: Tokenizer
    batch_size: int
    batches_per_worker: int
    seed: int
    rank: int
    world_size: int
    shuffle_buffer: int
    epoch: Any  # multiprocessing value: persistent workers read the epoch of the moment

    def __iter__(self) -> Iterator[Batch | Failure]:
        skips = SkipCounter()
        collector = _Collector(self.tokenizer, skips)
        made, begin, used = 0, time.monotonic(), 0
        for pass_index in range(2**31):
            used_before = used
            share = self._share(pass_index)
            for raw in self.source.train_samples(share, skips):
                seed = sample_seed(self.seed, share.epoch, pass_index, raw["__key__"])
                used += collector.add(raw, partial(self.decoder.train, raw, seed))
                if len(collector) == self.batch_size:
                    yield collector.batch()
                    made += 1
                    if made == self.batches_per_worker:
                        return
                if not used and time.monotonic() - begin > HOPELESS_S and skips.total.total() >= HOPELESS_SKIPS:
                    break
            if used == used_before:
                yield Failure(_nothing_usable("training", skips))
                return

    def _share(self, pass_index: int) -> Share:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return Share(
            seed=self.seed,
            epoch=self.epoch.value,
            pass_index=pass_index,
            consumer=self.rank * workers + worker,
            consumers=self.world_size * workers,
            shuffle_buffer=self.shuffle_buffer,
        )


def _nothing_usable(what: str, skips: SkipCounter) -> str:
    counts = describe(skips.total) or "no sample at all"
    example = f"; the last: {skips.example}" if skips.example else ""
    return f"the {what} data yields no usable sample ({counts}{example}); look at --{what[:5]}-data and --caption-keys"


@dataclass
class EvalStream(IterableDataset[Any]):
    """Every `consumers`-th sample, in file order."""

    source: Source
    decoder: Decoder
    tokenizer: Tokenizer
    batch_size: int
    rank: int
    world_size: int
    limit: int | None
    group_by: CaptionKey | None

    def __iter__(self) -> Iterator[Batch | Tail]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        mine, consumers = self.rank * workers + worker, self.world_size * workers
        skips = SkipCounter()
        collector = _Collector(self.tokenizer, skips, self.group_by)
        reading = skips if mine == 0 else SkipCounter()  # all read every tar: one counts the broken ones
        for index, raw in enumerate(self.source.in_order(reading)):
            if self.limit is not None and index >= self.limit:
                break
            if index % consumers != mine:
                continue
            collector.add(raw, partial(self.decoder.evaluate, raw))
            if len(collector) == self.batch_size:
                yield collector.batch()
        if len(collector):
            yield collector.batch()
        yield Tail(skips.take())
