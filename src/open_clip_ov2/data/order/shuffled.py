"""One pass over parts of tars, shuffled, begun anywhere without reading what was read to its end before."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from open_clip_ov2.data.order.assignment import Part, Ref, shuffler
from open_clip_ov2.data.order.position import Cursor
from open_clip_ov2.data.order.share import Share
from open_clip_ov2.data.skips import BROKEN_SHARD, SkipCounter
from open_clip_ov2.data.tars import read_tar


@dataclass
class ShuffledPass:
    """References go through the shuffle, the samples wait beside it in `held`.

    So a shuffle can be repeated up to `cursor` from the sizes of the shards alone; then only those shards are read
    again that have samples in its buffer, and the one that was being read.
    """

    urls: Sequence[str]
    parts: Sequence[Part]
    share: Share
    cursor: Cursor
    skips: SkipCounter
    held: dict[Ref, dict[str, Any] | None] = field(default_factory=dict)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = shuffler(self.share)(self._refs())
        for ref in itertools.islice(order, self.cursor.taken):
            del self.held[ref]
        self._read_again()
        for ref in order:
            sample = self.held.pop(ref)
            self.cursor.taken += 1
            if sample is not None:
                yield sample

    def _refs(self) -> Iterator[Ref]:
        known = tuple(self.cursor.sizes)
        for place, part in enumerate(self.parts):
            if place >= len(known):
                yield from self._read(place, part)
                continue
            for index in range(known[place]):
                if part.wants(index):
                    self.held[place, index] = None
                    yield place, index

    def _read(self, place: int, part: Part) -> Iterator[Ref]:
        # What was read to its end before had its break counted then.
        skips = self.skips if part.start is not None else SkipCounter(log=False)
        size = 0
        with self._open(part, skips, part.stop()) as samples:
            for size, sample in enumerate(samples, 1):
                if part.wants(size - 1):
                    self.held[place, size - 1] = sample
                    yield place, size - 1
        self._check(part, size, part.stop())
        self.cursor.sizes.append(size)

    def _read_again(self) -> None:
        """Gives samples to the references that wait in the buffer without one."""
        wanted: dict[int, set[int]] = {}
        for (place, index), sample in self.held.items():
            if sample is None:
                wanted.setdefault(place, set()).add(index)
        for place, indices in wanted.items():
            size, stop = 0, max(indices) + 1
            with self._open(self.parts[place], SkipCounter(log=False), stop) as samples:
                for size, sample in enumerate(samples, 1):
                    if size - 1 in indices:
                        self.held[place, size - 1] = sample
            self._check(self.parts[place], size, stop)

    @contextlib.contextmanager
    def _open(self, part: Part, skips: SkipCounter, stop: int | None) -> Iterator[Iterator[dict[str, Any]]]:
        self.cursor.opens(part.shard)
        samples = read_tar(self.urls[part.shard], skips)
        with contextlib.closing(samples):
            yield itertools.islice(samples, stop)

    def _check(self, part: Part, size: int, stop: int | None) -> None:
        if stop is not None and size < stop:
            detail = f"{size} samples, it had at least {stop} when it was read before"
            self.skips.add(BROKEN_SHARD, detail, "", self.urls[part.shard])
