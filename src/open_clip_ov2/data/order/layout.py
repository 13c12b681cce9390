"""Which streams of samples the batches of a launch are made of.

A stream is what `assignment` calls a consumer's part: shards of its own, read one after the other through a shuffle
buffer of its own. What is in it depends on the number of streams, so a run keeps its global batches on other numbers of
processes and data workers if only the streams are dealt out anew. A test runs this example of `--elastic 2x2`, global
batches of 8: which streams make the first four batches of each process, and how many samples of each.

>>> def first_batches(*launch):
...     layout = Layout.of((2, 2), *launch)
...     return [[layout.pieces(rank, number) for number in range(4)] for rank in range(layout.processes)]
>>> first_batches(4, 1, 2, 2)  # batches of 4, a step of one, 2 processes of 2 data workers, which take turns
[[([0], 4), ([1], 4), ([0], 4), ([1], 4)], [([2], 4), ([3], 4), ([2], 4), ([3], 4)]]
>>> first_batches(8, 1, 1, 2)  # one process
[[([0, 2], 4), ([1, 3], 4), ([0, 2], 4), ([1, 3], 4)]]
>>> first_batches(4, 2, 1, 4)  # one process that accumulates two batches
[[([0], 4), ([2], 4), ([1], 4), ([3], 4)]]
>>> first_batches(2, 4, 1, 2)  # and four, of which each stream makes two
[[([0], 2), ([2], 2), ([0], 2), ([2], 2)]]
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from open_clip_ov2.errors import UserError

Elastic = tuple[int, int]  # processes and workers, see `Layout.width` and `turns`


def parse_elastic(value: Any) -> Elastic:
    """`PROCESSESxWORKERS`. Raises UserError."""
    found = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", str(value).strip())
    if found is None:
        raise UserError(f"{value!r}: expected the most processes and data workers of each, for example 64x8")
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Layout:
    """A global batch has `part` samples of each of `width` streams, the next one as many of `width` others, and so on
    in turns. Stream `u * turns + t` is the u-th of turn t. The streams of a process follow one another.

    `accum_freq` batches of each of the `processes` make a global batch.
    """

    width: int
    turns: int
    part: int
    processes: int
    accum_freq: int = 1

    @classmethod
    def of(cls, elastic: Elastic | None, batch_size: int, accum_freq: int, processes: int, workers: int) -> Layout:
        """Without `elastic` each data worker has one stream. Raises UserError where this launch cannot have the
        batches of `elastic`."""
        workers = max(1, workers)
        if elastic is None:
            return cls(processes, workers, batch_size, processes)
        (width, turns), total = elastic, batch_size * accum_freq * processes
        name, own = f"--elastic {width}x{turns}", width // processes
        if width % processes:
            raise UserError(f"{name}: {processes} processes; expected a number that divides {width}")
        if total % width:
            raise UserError(f"{name}: the global batch, {total:,}, is not divisible by {width}")
        if own % accum_freq and accum_freq % own:
            raise UserError(
                f"{name}: of {width} parts of a global batch each process has {own}, and accumulates {accum_freq} "
                "batches (--accum-freq, --batch-size); one of these two numbers has to divide the other"
            )
        most = own if accum_freq > own else turns * accum_freq
        if most % workers:
            raise UserError(
                f"{name}: --workers {workers} for each of {processes} processes with --accum-freq {accum_freq}; "
                f"expected a number that divides {most}"
            )
        return cls(width, turns, total // width, processes, accum_freq)

    @property
    def streams(self) -> int:
        return self.width * self.turns

    @property
    def batch_size(self) -> int:
        return self.part * self.width // (self.processes * self.accum_freq)

    @property
    def order(self) -> list[int]:
        """What the samples of each global batch depend on."""
        return [self.width, self.turns, self.part]

    def pieces(self, rank: int, number: int) -> tuple[list[int], int]:
        """The streams that a process's batch of this number takes from, and how many samples of each.

        Batches number n, n + workers, n + 2 * workers ... take from the same streams or from others of the same worker.
        """
        step, micro = divmod(number, self.accum_freq)
        own = self.width // self.processes
        count = max(1, own // self.accum_freq)
        first = rank * own + micro * count % own
        return [u * self.turns + step % self.turns for u in range(first, first + count)], self.batch_size // count
