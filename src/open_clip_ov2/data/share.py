"""Who reads what: one consumer's part of a source, and what every source can do."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from open_clip_ov2.data.skips import SkipCounter


@dataclass(frozen=True)
class Share:
    """Which part of the data one consumer reads, and in which order. A consumer is one worker of one process."""

    seed: int
    epoch: int
    pass_index: int
    consumer: int
    consumers: int
    shuffle_buffer: int

    def rng(self, *more: object) -> random.Random:
        """A generator of its own for (seed, epoch, pass, more)."""
        return random.Random("/".join(map(str, (self.seed, self.epoch, self.pass_index, *more))))


class Source(Protocol):
    """Where samples come from. A raw sample has `__key__`, `__url__` and bytes or text by suffix or column."""

    @property
    def resampled(self) -> bool:
        """Whether a pass is drawn with replacement, so that one pass need not show everything."""

    def count(self) -> int | None:
        """Number of samples, if it is written down anywhere. Raises UserError if that cannot be read."""

    def check_consumers(self, consumers: int) -> None:
        """Raises UserError if so many cannot share this source."""

    def train_samples(self, share: Share, skips: SkipCounter) -> Iterator[dict[str, Any]]:
        """One pass over a consumer's part, shuffled; no sample twice."""

    def in_order(self, skips: SkipCounter | None = None) -> Iterator[dict[str, Any]]:
        """Everything, in file order."""
