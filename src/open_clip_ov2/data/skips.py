"""Samples that cannot be used: why, how many, and a bounded number of log lines."""

from __future__ import annotations

import logging
import time
from collections import Counter

logger = logging.getLogger(__name__)

MISSING_IMAGE = "missing image"
UNDECODABLE_IMAGE = "undecodable image"
TOO_MANY_PIXELS = "too many pixels"
MISSING_CAPTION = "missing caption"
EMPTY_CAPTION = "empty caption"
BAD_UTF8 = "bad UTF-8"
BAD_JSON = "bad JSON"
BROKEN_SHARD = "broken shard"
TRANSFORM_FAILED = "transform failed"

FIRST_LINES = 5  # of each cause, in each worker
SUMMARY_EVERY_S = 60.0


class SkipSample(Exception):
    """This sample cannot be used."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.detail = detail


class SkipCounter:
    """Counts by cause, of one data worker. Logs the first of each cause, then at most one line a minute."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self.example = ""
        self._since_take: Counter[str] = Counter()
        self._last_summary = time.monotonic()

    def add(self, cause: str, detail: str, key: str, url: str) -> None:
        self.total[cause] += 1
        self._since_take[cause] += 1
        self.example = f"{key} in {url}" if key else url
        if self.total[cause] <= FIRST_LINES:
            logger.warning("skipped %s: %s (%s)", self.example, cause, detail)
        elif time.monotonic() - self._last_summary > SUMMARY_EVERY_S:
            self._last_summary = time.monotonic()
            logger.warning("skipped so far in this worker: %s", describe(self.total))

    def take(self) -> dict[str, int]:
        """Counts since the last call."""
        counts = dict(self._since_take)
        self._since_take.clear()
        return counts


def describe(counts: dict[str, int] | Counter[str]) -> str:
    """`7 empty caption, 5 undecodable image`, most frequent first."""
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {cause}" for cause, count in rows)
