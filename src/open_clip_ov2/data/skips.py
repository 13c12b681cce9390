"""Samples that cannot be used: why, how many, and a bounded number of log lines."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from open_clip_ov2.errors import UserError

logger = logging.getLogger(__name__)

MISSING_IMAGE = "missing image"
UNDECODABLE_IMAGE = "undecodable image"
TOO_MANY_PIXELS = "too many pixels"
ODD_SHAPE = "odd shape"
MISSING_CAPTION = "missing caption"
EMPTY_CAPTION = "empty caption"
NO_CAPTION = "no caption in the set"
DROPPED = "dropped"  # and the name of the rule
BAD_UTF8 = "bad UTF-8"
BAD_JSON = "bad JSON"
BROKEN_SHARD = "broken shard"
BAD_ROW = "bad csv row"
TRANSFORM_FAILED = "transform failed"
TOKENIZER_FAILED = "tokenizer failed"

FIRST_LINES = 5  # of each cause, in each worker
SUMMARY_EVERY_S = 60.0
# A consumer that has found nothing usable at all gives up after this long and this many skips.
HOPELESS_S = 30.0
HOPELESS_SKIPS = 100
DOTTED = "since the name of a sample ends at its first dot: name the files without further dots"


class SkipSample(Exception):
    """This sample cannot be used."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail


def missing(cause: str, entries: Iterable[str], wanted: Collection[str], named: Iterable[str] = ()) -> SkipSample:
    """The skip of a sample that has none of the `wanted` entries (errors call them as `named`); it says so where names
    with several dots are the reason."""
    dotted = next((name for name in entries if "." in name and name.lower().rpartition(".")[2] in wanted), None)
    if dotted:
        return SkipSample(cause, f"its entries are {dotted} and the like, {DOTTED}")
    return SkipSample(cause, f"none of {', '.join(named or wanted)}")


@dataclass(frozen=True)
class Skipped:
    """One sample or line that an evaluation could not use: it is reported and is in no average."""

    key: str
    cause: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.cause}" + (f" ({self.detail})" if self.detail else "")


def summary(skipped: Sequence[Skipped]) -> str:
    """`3 missing image, 1 bad JSON; the first: q7: missing image (a.jpg)`; empty if there are none."""
    if not skipped:
        return ""
    return f"{describe(Counter(one.cause for one in skipped))}; the first: {skipped[0]}"


class SkipCounter:
    """Counts by cause for one data worker over all its epochs; with `keep_keys` each sample's key too.

    Logs the first `lines` of each cause, then at most one line a minute. `total` counts since `begin()`; `example` is
    the last skip with its reason, rather a broken shard than a sample, which it may explain; `used` is set by whoever
    uses the samples. With `gives_up`, `add` raises UserError once nothing usable can be expected any more.
    """

    def __init__(
        self, *, gives_up: bool = False, log: bool = True, keep_keys: bool = False, lines: float = FIRST_LINES
    ) -> None:
        self.total: Counter[str] = Counter()
        self.used = 0
        self.example = ""
        self._gives_up, self._log, self._lines = gives_up, log, lines
        self._ever: Counter[str] = Counter()
        self._since_take: Counter[str] = Counter()
        self._keep_keys, self._keys = keep_keys, dict[str, list[str]]()
        self._started = self._last_summary = time.monotonic()

    def begin(self) -> None:
        """An epoch begins: `total` and the clock start anew; `used` and what was logged do not."""
        self.total.clear()
        self._started = time.monotonic()

    def add(self, cause: str, detail: str, key: str, url: str) -> None:
        """Count one skip. Raises UserError if it `gives_up` and there is no hope left."""
        self.total[cause] += 1
        self._since_take[cause] += 1
        self._ever[cause] += 1
        if self._keep_keys:
            self._keys.setdefault(cause, []).append(key or url)
        reason = f"{f'{key} in {url}' if key else url}: {cause}" + (f" ({detail})" if detail else "")
        if cause == BROKEN_SHARD or BROKEN_SHARD not in self._ever:
            self.example = reason
        if self._log:
            self._write(cause, reason)
        late = time.monotonic() - self._started > HOPELESS_S
        if self._gives_up and late and not self.used and self.total.total() >= HOPELESS_SKIPS:
            raise nothing_usable("training", "--train-data", self.total, self.example)

    def add_broken(self, url: str, detail: str) -> None:
        """Count a broken shard."""
        self.add(BROKEN_SHARD, detail, "", url)

    def _write(self, cause: str, reason: str) -> None:
        now = time.monotonic()
        if self._ever[cause] <= self._lines:
            logger.warning("skipped %s", reason)
        elif now - self._last_summary > SUMMARY_EVERY_S:
            self._last_summary = now
            logger.warning("skipped so far in this worker: %s", describe(self._ever))

    def take(self) -> dict[str, int]:
        """Counts since the last call."""
        counts = dict(self._since_take)
        self._since_take.clear()
        return counts

    def take_keys(self) -> dict[str, list[str]]:
        """Keys by cause since the last call; for a broken shard its address."""
        keys, self._keys = self._keys, {}
        return keys


def nothing_usable(what: str, flag: str, counts: Mapping[str, int], example: str = "") -> UserError:
    """The error for data of which nothing can be used; `example` is that of a SkipCounter."""
    found = (describe(counts) or "no sample at all") + (f"; for example {example}" if example else "")
    return UserError(f"the {what} data has no usable sample ({found}); check {flag} and --caption-keys")


def describe(counts: Mapping[str, int]) -> str:
    """`7 empty caption, 5 undecodable image`, most frequent first."""
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {cause}" for cause, count in rows)


def merge_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sums of counts by cause."""
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)
