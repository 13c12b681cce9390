"""What one consumer reads in one pass, also where other numbers of consumers have read some of it already."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from webdataset.filters import shuffle as buffer_shuffle

from open_clip_ov2.data.order.position import Generation, Position
from open_clip_ov2.data.order.share import Share

SHUFFLE_INITIAL = 1000  # samples in the buffer before the first comes out, as in OpenCLIP
Ref = tuple[int, int]  # which of a consumer's parts, which sample of its shard


@dataclass(frozen=True)
class Part:
    """Samples of one shard that are still to come: those numbered in `left`, and all from `start` on, if not None."""

    shard: int
    left: frozenset[int] = frozenset()
    start: int | None = 0

    def wants(self, index: int) -> bool:
        return (self.start is not None and index >= self.start) or index in self.left

    def stop(self) -> int | None:
        """How many samples of the shard have to be read; None: all."""
        return None if self.start is not None else max(self.left) + 1


def shuffler(share: Share) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """webdataset's buffer shuffle: what comes out when depends on `share` and counts, never on the content."""
    initial = min(SHUFFLE_INITIAL, share.shuffle_buffer)
    shuffle = buffer_shuffle(share.shuffle_buffer, initial=initial, rng=share.rng("samples", share.consumer))
    return lambda items: iter(shuffle(items))


def parts_of(order: Sequence[int], share: Share) -> list[Part]:
    """The parts of one consumer, in its order, for shards that are in `order` in this pass.

    What others left of this pass: shards that nobody opened go round all consumers; those that were open go to few,
    because each who reads one must repeat the shuffle of the consumer that had it open.
    """
    before = share.before()
    if before is None:
        return [Part(shard) for shard in order[share.consumer :: share.consumers]]
    old_share, generation = before
    opened: list[Part] = []
    unopened: list[Part] = []
    for old, position in enumerate(generation):
        if position.pass_index > share.pass_index:
            continue
        parts = parts_of(order, old_share.of(old))
        begun = len(position.sizes) + 1 if position.pass_index == share.pass_index and position.taken else 0
        unopened += parts[begun:]
        heirs = _heirs(old, len(generation), share.consumers)
        if begun and share.consumer in heirs:
            rest = left_over(parts[:begun], position, old_share.of(old))
            opened += rest[heirs.index(share.consumer) :: len(heirs)]
    return opened + unopened[share.consumer :: share.consumers]


def _heirs(old: int, old_consumers: int, consumers: int) -> range:
    """The consumers that go on with what `old` had open: one, or several if there are more now."""
    if consumers > old_consumers:
        return range(old, consumers, old_consumers)
    return range(old % consumers, old % consumers + 1)


def left_over(begun: Sequence[Part], position: Position, share: Share) -> list[Part]:
    """What the consumer of `share` had not given out at `position`, of the parts it had begun. Reads nothing."""
    sizes, waiting, last = position.sizes, set[Ref](), -1

    def refs() -> Iterator[Ref]:
        nonlocal last
        for place, part in enumerate(begun):
            ended = place < len(sizes)
            for index in range(sizes[place]) if ended else itertools.islice(itertools.count(), part.stop()):
                if part.wants(index):
                    waiting.add((place, index))
                    last = last if ended else index
                    yield place, index

    for ref in itertools.islice(shuffler(share)(refs()), position.taken):
        waiting.remove(ref)
    by_place: dict[int, set[int]] = {}
    for place, index in waiting:
        by_place.setdefault(place, set()).add(index)
    rest = []
    for place, part in enumerate(begun):
        left, start = by_place.get(place, set()), None
        if place == len(sizes):
            left |= {index for index in part.left if index > last}
            start = None if part.start is None else max(part.start, last + 1)
        if left or start is not None:
            rest.append(Part(part.shard, frozenset(left), start))
    return rest


def rows_of(order: Sequence[int], share: Share) -> Iterator[int]:
    """`parts_of` for what is not in shards and not shuffled by a buffer: single rows in turns."""
    before = share.before()
    if before is None:
        return iter(order[share.consumer :: share.consumers])
    old_share, generation = before
    return itertools.islice(_unread_rows(order, old_share, generation), share.consumer, None, share.consumers)


def _unread_rows(order: Sequence[int], old_share: Share, generation: Generation) -> Iterator[int]:
    for old, position in enumerate(generation):
        if position.pass_index <= old_share.pass_index:
            taken = position.taken if position.pass_index == old_share.pass_index else 0
            yield from itertools.islice(rows_of(order, old_share.of(old)), taken, None)
