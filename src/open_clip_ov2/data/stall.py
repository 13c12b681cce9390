"""A warning while a batch is waited for too long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)


class StallWatch:
    """While entered, a thread looks whether `since` (time.monotonic(), s) lies `after_s` back, and then warns.

    Again after twice as long. `reading` says in words what is waited for. The one who waits only sets `since`.
    """

    def __init__(self, after_s: float, reading: Callable[[], str]) -> None:
        self.since: float | None = None
        self._after_s, self._reading = after_s, reading
        self._stop = threading.Event()

    def __enter__(self) -> StallWatch:
        threading.Thread(target=self._watch, name="data-stall", daemon=True).start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def _watch(self) -> None:
        seen, due_s, pause_s = None, self._after_s, self._after_s
        while not self._stop.wait(pause_s):
            since = self.since
            if since is None:
                pause_s = self._after_s
                continue
            if since != seen:
                seen, due_s = since, self._after_s
            waited_s = time.monotonic() - since
            if waited_s >= due_s:
                logger.warning("no batch for %.0f s: %s", waited_s, self._reading())
                due_s *= 2
            pause_s = max(0.0, due_s - waited_s)


def watched(items: Iterator[Any], watch: StallWatch) -> Iterator[Any]:
    """The same items, each waited for under `watch`."""
    with watch:
        while True:
            watch.since = time.monotonic()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                watch.since = None
            yield item
