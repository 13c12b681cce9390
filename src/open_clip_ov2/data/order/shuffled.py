"""One pass over shard ranges, shuffled, that can begin anywhere without reading finished shards again."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from open_clip_ov2.data.order.assignment import Assignment, Cursor, SampleIndex, ShardRange, shuffler


def _ignore(problem: str) -> None:
    pass


@dataclass
class ShuffledPass:
    """Indices go through the shuffle; their samples wait beside it in `loaded`.

    So the shuffle can be repeated up to `cursor` from the sizes of the shards alone; then only those shards are read
    again that have samples in its buffer, and the one that was being read.
    `read` opens a shard by its number and calls its second argument with what is broken in it; `on_broken` counts that.
    """

    ranges: Sequence[ShardRange]
    assignment: Assignment
    cursor: Cursor
    read: Callable[[int, Callable[[str], None]], Generator[Any, None, None]]
    on_broken: Callable[[int, str], None]
    loaded: dict[SampleIndex, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        order = shuffler(self.assignment)(self._indices())
        for index in itertools.islice(order, self.cursor.taken):
            del self.loaded[index]
        self._read_again()
        for index in order:
            sample = self.loaded.pop(index)
            self.cursor.taken += 1
            if sample is not None:
                yield sample

    def _indices(self) -> Iterator[SampleIndex]:
        known = tuple(self.cursor.sizes)
        for place, part in enumerate(self.ranges):
            if place >= len(known):
                yield from self._read(place, part)
                continue
            for index in range(known[place]):
                if part.includes(index):
                    self.loaded[place, index] = None
                    yield place, index

    def _read(self, place: int, part: ShardRange) -> Iterator[SampleIndex]:
        # A shard that was read to its end before has been counted then, if it is broken.
        on_broken = partial(self.on_broken, part.shard) if part.start is not None else _ignore
        size = 0
        for index, sample in self._samples(part, part.stop(), on_broken):
            size = index + 1
            if part.includes(index):
                self.loaded[place, index] = sample
                yield place, index
        self.cursor.sizes.append(size)

    def _read_again(self) -> None:
        """Load the samples whose indices wait in the buffer."""
        wanted: dict[int, set[int]] = {}
        for (place, index), sample in self.loaded.items():
            if sample is None:
                wanted.setdefault(place, set()).add(index)
        for place, indices in wanted.items():
            for index, sample in self._samples(self.ranges[place], max(indices) + 1, _ignore):
                if index in indices:
                    self.loaded[place, index] = sample

    def _samples(
        self, part: ShardRange, stop: int | None, on_broken: Callable[[str], None]
    ) -> Iterator[tuple[int, Any]]:
        """A shard's first samples by number, up to `stop`; all of them without. One that has fewer now is counted."""
        self.cursor.on_open(part.shard)
        size = 0
        with contextlib.closing(self.read(part.shard, on_broken)) as samples:
            for index, sample in enumerate(itertools.islice(samples, stop)):
                size = index + 1
                yield index, sample
        if stop is not None and size < stop:
            self.on_broken(part.shard, f"{size} samples, where there were at least {stop} when it was read before")
