"""How far a consumer has come in its part of the data. A consumer is one data worker of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Position(NamedTuple):
    """`taken` raw samples of pass `pass_index`; `sizes`: samples of its first shards, those read to their end.

    The shuffle looks ahead: samples of a shard that was read to its end may still wait in its buffer.
    """

    pass_index: int = 0
    taken: int = 0
    sizes: Sequence[int] = ()


Generation = tuple[Position, ...]  # of all consumers of one start of the run, the workers of process 0 first


def _to_nobody(shard: int) -> None:
    pass


@dataclass
class Cursor:
    """A position within a pass that moves: a source goes on from it, and keeps it up to date.

    `opens` hears of each shard (or row) before it is opened, by number.
    """

    taken: int = 0
    sizes: list[int] = field(default_factory=list)
    opens: Callable[[int], None] = _to_nobody
