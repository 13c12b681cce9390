"""From torch's data workers to the main process: batches, errors as they are, the count of skips, and stalls."""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from open_clip_ov2.data.skips import merge_counts
from open_clip_ov2.data.streams import Batch
from open_clip_ov2.errors import UserError

logger = logging.getLogger(__name__)

# torch's words for a dead worker. An exception inside a worker says "in DataLoader worker process" and is not one.
DEATH = re.compile(r"DataLoader worker \((pid[^)]*\)?[^)]*)\) (exited unexpectedly|is killed by signal: [\w ]+)")
DEATH_S = 1.0  # torch hears of a death within milliseconds, if it has not already


def worker_death(error: BaseException) -> UserError | None:
    """The UserError for a data worker that died; None if `error` says something else.

    torch also raises from its SIGCHLD handler, at any place of the main thread: a training loop may ask here too.
    """
    how = ""
    if isinstance(error, (EOFError, ConnectionError)):
        how = f"the connection to it broke: {type(error).__name__}"
        try:
            time.sleep(DEATH_S)  # torch's message on how the worker died comes with SIGCHLD, a moment later
        except RuntimeError as raised:
            error, how = raised, str(raised)
    if found := DEATH.search(str(error)):
        how = f"{found[1]} {found[2].strip()}"
    if not how:
        return None
    return UserError(
        f"a data worker died ({how}): probably out of memory or of shared memory (/dev/shm); "
        "try fewer --workers or a smaller --shuffle-buffer, and look into the system's log"
    )


class Receiver:
    """What the loaders share: raising what a worker sends, and the running count of skips.

    `skips`: counts by cause of the batches seen since iterating began or `reset_skips()`; `skipped_keys`, in
    evaluation: which samples those were, and the reason of one of them, `example`.
    """

    def __init__(self, num_workers: int) -> None:
        self._from_processes = num_workers > 0
        self.reset_skips()

    def reset_skips(self) -> None:
        self.skips: dict[str, int] = {}
        self.skipped_keys: dict[str, list[str]] = {}
        self.example = ""

    def receive(self, items: Iterable[Any]) -> Iterator[Batch]:
        try:
            for item in items:
                if isinstance(item, UserError):
                    raise item
                self.skips = merge_counts((self.skips, item.skipped))
                self.example = self.example or item.example  # worker 0, which tells of broken shards, comes first
                for cause, keys in item.skipped_keys.items():
                    self.skipped_keys.setdefault(cause, []).extend(keys)
                if item.keys:
                    yield item
        except (RuntimeError, EOFError, ConnectionError) as error:
            # An error raised in the worker says "Caught"; another may be of the connection to one that is dying.
            if not self._from_processes or str(error).startswith("Caught"):
                raise
            raise worker_death(error) or error from error


def watched(items: Iterable[Any], after_s: float, reading: Callable[[], str]) -> Iterator[Any]:
    """The same items. While one is waited for longer than `after_s`, a warning names what is being read.

    The next warning comes after twice as long.
    """
    since: float | None = None
    stop = threading.Event()

    def watch() -> None:
        due_s = after_s
        while not stop.wait(after_s / 10):
            begun = since
            waited_s = 0.0 if begun is None else time.monotonic() - begun
            if waited_s < after_s:
                due_s = after_s
            elif waited_s >= due_s:
                logger.warning("no batch for %.0f s: %s", waited_s, reading())
                due_s *= 2

    threading.Thread(target=watch, name="data-stall", daemon=True).start()
    since = time.monotonic()
    try:
        for item in items:
            since = None
            yield item
            since = time.monotonic()
    finally:
        stop.set()


def torch_loader(stream: IterableDataset[Any], num_workers: int, pin_memory: bool, persistent: bool) -> DataLoader[Any]:
    return DataLoader(
        stream,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=num_workers,
        persistent_workers=persistent and num_workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=partial(_init_worker, leaving=_leaving()),
        generator=torch.Generator(),  # or else each iteration draws from the generator that the model uses
    )


def _unchanged(batch: Any) -> Any:
    """torch's own collate_fn would look at every key and caption for arrays to convert."""
    return batch


@functools.cache
def _leaving() -> Any:
    """A flag that data workers see, set when this process exits."""
    flag = multiprocessing.RawValue("b", 0)

    def leave() -> None:
        flag.value = 1

    atexit.register(leave)  # runs before multiprocessing's own, which ends the workers by TERM and waits for them
    return flag


def _init_worker(_: int, leaving: Any) -> None:
    """Leave signals to the main process: a forked worker would otherwise run its handlers.

    A scheduler sends TERM to workers too, whose batches are still needed until the main process stops.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if leaving.value else None)
