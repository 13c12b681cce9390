"""Who reads what: one consumer's part of a source, and what every source can do."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from open_clip_ov2.data.order.position import Cursor, Generation
from open_clip_ov2.data.skips import SkipCounter


@dataclass(frozen=True)
class Share:
    """Which part of the data one consumer reads, and in which order. A consumer is one worker of one process.

    `history`: where other numbers of consumers stopped earlier in this epoch, the oldest first.
    """

    seed: int
    epoch: int
    pass_index: int
    consumer: int
    consumers: int
    shuffle_buffer: int
    history: tuple[Generation, ...] = ()

    def rng(self, *more: object) -> random.Random:
        """A generator of its own for (seed, epoch, pass, more)."""
        return random.Random("/".join(map(str, (self.seed, self.epoch, self.pass_index, *more))))

    def of(self, consumer: int) -> Share:
        """The same pass for another consumer of the same number."""
        return replace(self, consumer=consumer)

    def before(self) -> tuple[Share, Generation] | None:
        """How this pass was shared out when another number of consumers began it, and where they stopped."""
        for index in reversed(range(len(self.history))):
            generation = self.history[index]
            if any(position.pass_index >= self.pass_index for position in generation):
                return replace(self, consumer=0, consumers=len(generation), history=self.history[:index]), generation
        return None


class Source(Protocol):
    """Where samples come from. A raw sample has `__key__`, `__url__` and bytes or text by suffix or column."""

    @property
    def resampled(self) -> bool:
        """Whether a pass is drawn with replacement, so that one pass need not show everything."""

    def count(self) -> int | None:
        """Number of samples, if it is written down anywhere. Raises UserError if that cannot be read."""

    def check_consumers(self, consumers: int) -> None:
        """Raises UserError if so many cannot share this source."""

    def fingerprint(self) -> dict[str, str | int]:
        """What the order of samples depends on, small; equal for equal data."""

    def place(self, index: int) -> str:
        """In words, what `Cursor.opens` names by number."""

    def train_samples(self, share: Share, skips: SkipCounter, cursor: Cursor | None = None) -> Iterator[dict[str, Any]]:
        """One pass over a consumer's part, shuffled, from `cursor` on; no sample twice."""

    def in_order(self, skips: SkipCounter | None = None) -> Iterator[dict[str, Any]]:
        """Everything, in file order."""
