"""What runs inside a data worker: raw samples to batches, or the reason why there are none.

Shapes: B batch, C channels, H and W pixels, L caption tokens.
"""

from __future__ import annotations

import itertools
import multiprocessing
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from open_clip_ov2.core.native import Images, concatenated
from open_clip_ov2.data.captions import PROMPT_END, CaptionKey, group_text
from open_clip_ov2.data.crop import as_batch
from open_clip_ov2.data.order.assignment import Assignment, Cursor, Position
from open_clip_ov2.data.order.layout import Layout
from open_clip_ov2.data.order.resume import Start
from open_clip_ov2.data.samples import Decoder, sample_seed, seeded
from open_clip_ov2.data.skips import TOKENIZER_FAILED, SkipCounter, SkipSample, merge_counts, nothing_usable
from open_clip_ov2.data.sources import Source
from open_clip_ov2.errors import UserError

Tokenizer = Callable[[list[str]], Tensor]
# A consumer gives up after so many passes in a row without a usable sample, where one pass does not show it everything:
# with as many shards as consumers, one bad shard among good ones comes back 32 times with chance 2^-32 at most.
EMPTY_PASSES = 32


class Batch(NamedTuple):
    """`images_BCHW` from the transform (NativeImages, if it keeps their shapes), `texts_BL` int64; `skipped` since this
    worker's last batch, by cause. One without keys comes last and tells what was skipped after the last samples.

    In training, `positions` is where its consumers stand after it, with the sizes of shards since their last batch, and
    `seeds` are the samples' own; with --elastic, `draw`, in [0, 1), is the global batch's own.
    In evaluation, `indices` are the samples' places in the file order and `skipped_keys` the samples that were skipped;
    the one without keys has the counter's `example`. `prompts` are what stands before the captions, where that is
    asked for.
    """

    images_BCHW: Images
    texts_BL: Tensor
    keys: list[str]
    captions: list[str]
    groups: list[str]
    skipped: dict[str, int]
    positions: Mapping[int, Position] = {}
    indices: tuple[int, ...] = ()
    skipped_keys: Mapping[str, list[str]] = {}
    prompts: tuple[str, ...] = ()
    example: str = ""
    seeds: tuple[int, ...] = ()
    draw: float | None = None


def joined(parts: Sequence[Batch]) -> Batch:
    """Batches of several consumers as one."""
    if len(parts) == 1:
        return parts[0]

    def chained(name: str) -> Iterator[Any]:
        return itertools.chain.from_iterable(getattr(part, name) for part in parts)

    return Batch(
        images_BCHW=concatenated([part.images_BCHW for part in parts]),
        texts_BL=torch.cat([part.texts_BL for part in parts]),
        keys=list(chained("keys")),
        captions=list(chained("captions")),
        groups=list(chained("groups")),
        skipped=merge_counts(part.skipped for part in parts),
        positions={consumer: position for part in parts for consumer, position in part.positions.items()},
        prompts=tuple(chained("prompts")),
        seeds=tuple(chained("seeds")),
    )


class _Row(NamedTuple):
    image_CHW: Tensor
    caption: str
    key: str
    url: str
    group: str
    place: int
    seed: int


class _Collector:
    """Decoded samples until a batch is full. Keeps `skips.used`: samples delivered or waiting."""

    def __init__(
        self, transform: Any, tokenizer: Tokenizer | None, skips: SkipCounter, group_by: CaptionKey | None = None
    ) -> None:
        self._transform = transform  # which has made the images
        self._tokenizer, self._skips, self._group_by = tokenizer, skips, group_by
        self.rows: list[_Row] = []

    def add(
        self, raw: dict[str, Any], decode: Callable[[], tuple[Tensor, str]], index: int = -1, seed: int = 0
    ) -> None:
        """Add the sample, or count why not."""
        try:
            image_CHW, caption = decode()
        except SkipSample as error:
            self._skips.add(error.cause, error.detail, raw["__key__"], raw["__url__"])
            return
        group = group_text(raw, self._group_by)
        self.rows.append(_Row(image_CHW, caption, raw["__key__"], raw["__url__"], group, index, seed))
        self._skips.used += 1

    def batch(self) -> Batch | None:
        """All rows as a batch; None if the tokenizer refused some, which are removed and counted."""
        texts_BL = self.tokenized()
        if texts_BL is None:
            return None
        images, captions, keys, _, groups, indices, seeds = zip(*self.rows, strict=True)
        self.rows = []
        parts = [text.partition(PROMPT_END) for text in captions]
        prompts: tuple[str, ...] = ()
        if all(end for _, end, _ in parts):  # the decoder puts a prompt before each caption or before none
            prompts, captions = tuple(part[0] for part in parts), tuple(part[2] for part in parts)
        return Batch(
            as_batch(images, self._transform), texts_BL, list(keys), list(captions), list(groups), self._skips.take(),
            indices=indices, skipped_keys=self._skips.take_keys(), prompts=prompts, seeds=seeds,
        )  # fmt: skip

    def tokenized(self) -> Tensor | None:
        """Token ids `(B, L)` of the rows in one call; None after removing the rows that the tokenizer refuses."""
        if not self.rows:
            return None
        try:
            return self._ids([row.caption for row in self.rows])
        except UserError:
            raise
        except Exception:  # one caption must not end a run: look for it
            before, self.rows = len(self.rows), [row for row in self.rows if self._accepts(row)]
            if len(self.rows) == before:
                raise
            return None

    def _accepts(self, row: _Row) -> bool:
        try:
            self._ids([row.caption])
        except Exception as error:
            self._skips.used -= 1
            self._skips.add(TOKENIZER_FAILED, f"{type(error).__name__}: {error}", row.key, row.url)
            return False
        return True

    def _ids(self, captions: list[str]) -> Tensor:
        if self._tokenizer is None:
            return torch.empty(len(captions), 0, dtype=torch.int64)
        with seeded(0):  # some tokenizers draw which words they keep
            return self._tokenizer(captions)


class _Stream(IterableDataset[Any]):
    """A UserError becomes an item, so that it reaches the main process as it is, not wrapped in a traceback."""

    def __iter__(self) -> Iterator[Batch | UserError]:
        try:
            yield from self._items()
        except UserError as error:
            yield UserError(str(error))

    def _items(self) -> Iterator[Batch]:
        raise NotImplementedError


@dataclass
class TrainStream(_Stream):
    """One worker's batches of one epoch: every `workers`-th of those that are left.

    torch asks the workers in turns, always from worker 0 on; after n batches of an epoch, worker w begins with number
    n + w. `layout` says which consumers make a batch, and they are always the same worker's.
    """

    source: Source
    decoder: Decoder
    tokenizer: Tokenizer
    layout: Layout
    elastic: bool
    num_batches: int
    seed: int
    rank: int
    shuffle_buffer: int
    # Shared with the workers, which persist: what each reads, the epoch, and whether it begins at `start`.
    reading: Any
    epoch: Any = field(default_factory=partial(multiprocessing.Value, "q", 0))
    resuming: Any = field(default_factory=partial(multiprocessing.Value, "q", 0))
    start: Start = field(default_factory=Start)
    skips: SkipCounter = field(default_factory=partial(SkipCounter, gives_up=True))

    def _items(self) -> Iterator[Batch]:
        self.skips.begin()
        start, epoch = self.start if self.resuming.value else Start(), self.epoch.value
        whole = {"pass_index": 0, "consumer": 0, "consumers": self.layout.streams}
        first = Assignment(self.seed, epoch, **whole, shuffle_buffer=self.shuffle_buffer, history=start.history)
        worker, workers = _worker()
        consumers: dict[int, Iterator[Batch]] = {}
        for number in range(start.batches_done + worker, self.num_batches, workers):
            numbers, samples = self.layout.pieces(self.rank, number)
            for consumer in numbers:
                if consumer not in consumers:
                    consumers[consumer] = self._endless(first.of(consumer), start, worker, samples)
            batch = joined([next(consumers[consumer]) for consumer in numbers])
            step = number // self.layout.accum_freq
            yield batch._replace(draw=random.Random(f"{self.seed}/{epoch}/{step}").random()) if self.elastic else batch

    def _endless(self, first: Assignment, start: Start, worker: int, samples: int) -> Iterator[Batch]:
        """A consumer's samples, so many at a time, pass after pass. Raises UserError after too many passes without a
        usable one."""
        position = start.positions[first.consumer] if start.positions else Position()
        collector = _Collector(self.decoder.transform, self.tokenizer, self.skips)
        empty, most = 0, 1 if first.consumers == 1 and not self.source.resampled else EMPTY_PASSES
        cursor = Cursor(position.taken, list(position.sizes))
        for pass_index in itertools.count(position.pass_index):
            assignment = replace(first, pass_index=pass_index)
            cursor.on_open = partial(self.reading.__setitem__, worker)
            whole = not cursor.taken and assignment.before() is None
            self.skips.used += cursor.taken > 0  # a batch had come of it, or nothing would have been taken
            used_before = self.skips.used
            yield from self._pass(collector, assignment, cursor, samples)
            collector.tokenized()  # removes what the tokenizer refuses, so that `used` says what this pass gave
            empty = 0 if self.skips.used > used_before or not whole else empty + 1
            if empty == most:
                raise nothing_usable("training", "--train-data", self.skips.total, self.skips.example)
            cursor = Cursor()

    def _pass(self, collector: _Collector, assignment: Assignment, cursor: Cursor, samples: int) -> Iterator[Batch]:
        sent = len(cursor.sizes)
        for raw in self.source.train_samples(assignment, self.skips, cursor):
            seed = sample_seed(assignment.seed, assignment.epoch, assignment.pass_index, raw["__key__"])
            collector.add(raw, partial(self.decoder.train, raw, seed), seed=seed)
            if len(collector.rows) == samples and (batch := collector.batch()) is not None:
                position = Position(assignment.pass_index, cursor.taken, cursor.sizes[sent:])
                yield batch._replace(positions={assignment.consumer: position})
                sent = len(cursor.sizes)


def _worker() -> tuple[int, int]:
    """Which data worker this is, of how many."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


@dataclass
class EvalStream(_Stream):
    """Every `consumers`-th sample, in file order."""

    source: Source
    decoder: Decoder
    tokenizer: Tokenizer | None
    batch_size: int
    rank: int
    world_size: int
    limit: int | None
    group_by: CaptionKey | None

    def _items(self) -> Iterator[Batch]:
        worker, workers = _worker()
        mine, consumers = self.rank * workers + worker, self.world_size * workers
        skips = SkipCounter(keep_keys=True)
        collector = _Collector(self.decoder.transform, self.tokenizer, skips, self.group_by)
        reading = skips if mine == 0 else SkipCounter(log=False)  # all read every tar: one counts the broken ones
        samples = enumerate(self.source.in_order(reading))
        for index, raw in itertools.islice(samples, mine, self.limit, consumers):
            collector.add(raw, partial(self.decoder.evaluate, raw), index)
            if len(collector.rows) == self.batch_size and (batch := collector.batch()) is not None:
                yield batch
        while collector.rows:  # twice if the tokenizer refuses a row
            if (batch := collector.batch()) is not None:
                yield batch
        yield Batch(
            torch.empty(0), torch.empty(0), [], [], [], skips.take(), skipped_keys=skips.take_keys(),
            example=skips.example,
        )  # fmt: skip
