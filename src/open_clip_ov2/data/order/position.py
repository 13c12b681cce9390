"""How far a consumer has come in its part of the data. A consumer is one data worker of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Position(NamedTuple):
    """`taken` raw samples of pass `pass_index`; `sizes`: numbers of samples of its first shards, those read to the end.

    The shuffle buffer looks ahead: samples of a shard that was read to its end may still wait in it.
    """

    pass_index: int = 0
    taken: int = 0
    sizes: Sequence[int] = ()


Positions = tuple[Position, ...]  # of all consumers of one launch of the run, the workers of process 0 first


def _ignore(shard: int) -> None:
    pass


@dataclass
class Cursor:
    """A position within a pass that a source continues from and keeps up to date.

    `on_open` is called with the number of each shard (or row) before it is opened.
    """

    taken: int = 0
    sizes: list[int] = field(default_factory=list)
    on_open: Callable[[int], None] = _ignore
