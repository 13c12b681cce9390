"""What one consumer reads in one pass, also where another number of consumers has read some of the pass already, and
its samples, shuffled, from any place on."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from webdataset.filters import shuffle as buffer_shuffle

SHUFFLE_INITIAL = 1000  # samples in the buffer before the first comes out, as in OpenCLIP
SampleIndex = tuple[int, int]  # which of a consumer's shard ranges, which sample of that shard


class Position(NamedTuple):
    """How far a consumer has come: `taken` raw samples of pass `pass_index`; `sizes`: numbers of samples of its first
    shards, those read to the end. The shuffle buffer looks ahead: samples of such a shard may still wait in it.
    """

    pass_index: int = 0
    taken: int = 0
    sizes: Sequence[int] = ()


Positions = tuple[Position, ...]  # of all consumers of one launch of the run, the workers of process 0 first


@dataclass
class Cursor:
    """A position within a pass that a source continues from and keeps up to date.

    `on_open` is called with the number of each shard (or row) before it is opened.
    """

    taken: int = 0
    sizes: list[int] = field(default_factory=list)
    on_open: Callable[[int], None] = lambda _: None


@dataclass(frozen=True)
class Assignment:
    """Consumer `consumer` of `consumers` in one pass: what it reads and in which order follows from these numbers.

    `history`: where other numbers of consumers stopped earlier in this epoch, oldest first.
    """

    seed: int
    epoch: int
    pass_index: int
    consumer: int
    consumers: int
    shuffle_buffer: int
    history: tuple[Positions, ...] = ()

    def rng(self, *more: object) -> random.Random:
        """A generator of its own for (seed, epoch, pass, more)."""
        return random.Random("/".join(map(str, (self.seed, self.epoch, self.pass_index, *more))))

    def of(self, consumer: int) -> Assignment:
        """The same pass for another consumer of the same launch."""
        return replace(self, consumer=consumer)

    def before(self) -> tuple[Assignment, Positions] | None:
        """The assignment of this pass in the launch before, of its consumer 0, and where its consumers stopped.

        None if this launch begins the pass.
        """
        for index in reversed(range(len(self.history))):
            positions = self.history[index]
            if any(position.pass_index >= self.pass_index for position in positions):
                return replace(self, consumer=0, consumers=len(positions), history=self.history[:index]), positions
        return None


@dataclass(frozen=True)
class ShardRange:
    """Samples of one shard that are still to read: those numbered in `scattered`, and all from `start` on, if set."""

    shard: int
    scattered: frozenset[int] = frozenset()
    start: int | None = 0

    def includes(self, index: int) -> bool:
        return (self.start is not None and index >= self.start) or index in self.scattered

    def stop(self) -> int | None:
        """How many samples of the shard have to be read; None: all."""
        return None if self.start is not None else max(self.scattered) + 1


def shuffler(assignment: Assignment) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """webdataset's buffer shuffle: what comes out when depends on `assignment` and counts, never on the content."""
    buffer = assignment.shuffle_buffer
    rng = assignment.rng("samples", assignment.consumer)
    shuffle = buffer_shuffle(buffer, initial=min(SHUFFLE_INITIAL, buffer), rng=rng)
    return lambda items: iter(shuffle(items))


def assigned_shards(order: Sequence[int], assignment: Assignment) -> list[ShardRange]:
    """What a consumer reads, in its order, of the shards that come in `order` in this pass.

    After a launch with another number of consumers, shards that nobody had opened are dealt out to all. Those that were
    open go to few, because whoever reads one must repeat the shuffle of the consumer that had it open.
    """
    before = assignment.before()
    if before is None:
        return [ShardRange(shard) for shard in order[assignment.consumer :: assignment.consumers]]
    old_assignment, positions = before
    opened: list[ShardRange] = []
    unopened: list[ShardRange] = []
    for old, position in enumerate(positions):
        if position.pass_index > assignment.pass_index:
            continue
        ranges = assigned_shards(order, old_assignment.of(old))
        begun = len(position.sizes) + 1 if position.pass_index == assignment.pass_index and position.taken else 0
        unopened += ranges[begun:]
        successors = _successors(old, len(positions), assignment.consumers)
        if begun and assignment.consumer in successors:
            rest = unread(ranges[:begun], position, old_assignment.of(old))
            opened += rest[successors.index(assignment.consumer) :: len(successors)]
    return opened + unopened[assignment.consumer :: assignment.consumers]


def _successors(old: int, old_consumers: int, consumers: int) -> range:
    """The consumers that continue what consumer `old` had open: one, or several if there are more now."""
    if consumers > old_consumers:
        return range(old, consumers, old_consumers)
    return range(old % consumers, old % consumers + 1)


def unread(begun: Sequence[ShardRange], position: Position, assignment: Assignment) -> list[ShardRange]:
    """What a consumer had not given out at `position` of the ranges that it had begun. Reads no data."""
    sizes, waiting, last = position.sizes, set[SampleIndex](), -1

    def indices() -> Iterator[SampleIndex]:
        nonlocal last
        for place, part in enumerate(begun):
            ended = place < len(sizes)
            for index in range(sizes[place]) if ended else itertools.islice(itertools.count(), part.stop()):
                if part.includes(index):
                    waiting.add((place, index))
                    last = last if ended else index
                    yield place, index

    for one in itertools.islice(shuffler(assignment)(indices()), position.taken):
        waiting.remove(one)
    by_place: dict[int, set[int]] = {}
    for place, index in waiting:
        by_place.setdefault(place, set()).add(index)
    rest = []
    for place, part in enumerate(begun):
        scattered, start = by_place.get(place, set()), None
        if place == len(sizes):  # this one was being read
            scattered |= {index for index in part.scattered if index > last}
            start = None if part.start is None else max(part.start, last + 1)
        if scattered or start is not None:
            rest.append(ShardRange(part.shard, frozenset(scattered), start))
    return rest


def assigned_rows(order: Sequence[int], assignment: Assignment) -> Iterator[int]:
    """`assigned_shards` for data that is not in shards: single rows in turns, without a buffer."""
    before = assignment.before()
    if before is None:
        return iter(order[assignment.consumer :: assignment.consumers])
    return itertools.islice(_unread_rows(order, *before), assignment.consumer, None, assignment.consumers)


def _unread_rows(order: Sequence[int], assignment: Assignment, positions: Positions) -> Iterator[int]:
    for old, position in enumerate(positions):
        if position.pass_index <= assignment.pass_index:
            taken = position.taken if position.pass_index == assignment.pass_index else 0
            yield from itertools.islice(assigned_rows(order, assignment.of(old)), taken, None)


@dataclass
class ShuffledPass:
    """A consumer's samples from `cursor` on. Indices go through the shuffle; samples wait beside it in `loaded`.

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
        on_broken = partial(self.on_broken, part.shard) if part.start is not None else lambda _: None
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
            for index, sample in self._samples(self.ranges[place], max(indices) + 1, lambda _: None):
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
