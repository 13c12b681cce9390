"""One pass over shard ranges, shuffled, that can begin anywhere without reading finished shards again."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from open_clip_ov2.data.order.assignment import Assignment, SampleIndex, ShardRange, shuffler
from open_clip_ov2.data.order.position import Cursor


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
        with self._open(part, part.stop(), on_broken) as samples:
            for size, sample in enumerate(samples, 1):
                if part.includes(size - 1):
                    self.loaded[place, size - 1] = sample
                    yield place, size - 1
        self._check_size(part, size, part.stop())
        self.cursor.sizes.append(size)

    def _read_again(self) -> None:
        """Load the samples whose indices wait in the buffer."""
        wanted: dict[int, set[int]] = {}
        for (place, index), sample in self.loaded.items():
            if sample is None:
                wanted.setdefault(place, set()).add(index)
        for place, indices in wanted.items():
            size, stop = 0, max(indices) + 1
            with self._open(self.ranges[place], stop, _ignore) as samples:
                for size, sample in enumerate(samples, 1):
                    if size - 1 in indices:
                        self.loaded[place, size - 1] = sample
            self._check_size(self.ranges[place], size, stop)

    @contextlib.contextmanager
    def _open(
        self, part: ShardRange, stop: int | None, on_broken: Callable[[str], None]
    ) -> Iterator[Iterator[dict[str, Any]]]:
        self.cursor.on_open(part.shard)
        with contextlib.closing(self.read(part.shard, on_broken)) as samples:
            yield itertools.islice(samples, stop)

    def _check_size(self, part: ShardRange, size: int, least: int | None) -> None:
        if least is not None and size < least:
            self.on_broken(part.shard, f"{size} samples, where there were at least {least} when it was read before")
