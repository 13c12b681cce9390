"""What is left of a pass that a consumer had begun."""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Iterator

from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from open_clip_ov2.data import order
from open_clip_ov2.data.order import layout
from open_clip_ov2.data.order.assignment import Assignment, Position, ShardRange, shuffler, unread


@st.composite
def shards_and_ranges(draw: st.DrawFn) -> list[tuple[int, ShardRange]]:
    """(size, range) of shards, some of which are partly or, up to a sample, wholly used already."""
    made = []
    for shard in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 12))
        start = draw(st.none() | st.integers(0, size))
        left = (
            draw(st.frozensets(st.integers(0, (size if start is None else start) - 1))) if start != 0 else frozenset()
        )
        if left or start is not None:
            made.append((size, ShardRange(shard, left, start)))
    return made


@limits(max_examples=300, deadline=None)
@given(shards_and_ranges(), st.integers(0, 40), st.integers(1, 12), st.integers(0, 5))
def test_unread_is_what_was_not_given_out(
    shards: list[tuple[int, ShardRange]], taken: int, buffer: int, seed: int
) -> None:
    """Oracle: a set. The same samples go through the shuffle, which also tells which shards it read to their end."""
    assignment = Assignment(seed, 0, 0, 0, 1, buffer)
    sizes: list[int] = []

    def read() -> Iterator[tuple[int, int]]:
        for size, part in shards:
            stop = part.stop() or size
            yield from ((part.shard, index) for index in range(stop) if part.includes(index))
            sizes.append(stop)

    order = shuffler(assignment)(read())
    given_out = list(itertools.islice(order, taken))
    position = Position(0, len(given_out), list(sizes))
    parts = [part for _, part in shards]
    rest = unread(parts[: len(sizes) + 1], position, assignment) + parts[len(sizes) + 1 :]
    everything = {(part.shard, index) for size, part in shards for index in range(size) if part.includes(index)}
    size_of = {part.shard: size for size, part in shards}
    left = [(part.shard, index) for part in rest for index in range(size_of[part.shard]) if part.includes(index)]
    assert len(left) == len(set(left))
    assert set(left) == everything - set(given_out)


def test_the_worked_example_is_true() -> None:
    """Oracle: the outputs written in the docstrings of the package and of its layout."""
    for module, examples in ((order, 10), (layout, 4)):
        failed, attempted = doctest.testmod(module)
        assert (failed, attempted > examples) == (0, True)
