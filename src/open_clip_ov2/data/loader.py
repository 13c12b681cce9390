"""Batches for training and evaluation.

Shapes: B batch, C channels, H and W pixels, L caption tokens.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from open_clip_ov2.data.captions import CaptionKey
from open_clip_ov2.data.samples import MAX_IMAGE_PIXELS, Decoder
from open_clip_ov2.data.share import Source
from open_clip_ov2.data.skips import describe
from open_clip_ov2.data.streams import Batch, EvalStream, Failure, Tokenizer, TrainStream
from open_clip_ov2.errors import UserError

__all__ = ["Batch", "EvalLoader", "TrainLoader", "worker_death"]

# torch's words for a dead worker. An exception inside a worker says "in DataLoader worker process" and is not one.
DEATH = re.compile(r"DataLoader worker \((pid[^)]*\)?[^)]*)\) (exited unexpectedly|is killed by signal: [\w ]+)")


def worker_death(error: RuntimeError) -> UserError | None:
    """The UserError for a data worker that died; None if `error` tells of something else.

    Torch also raises from its SIGCHLD handler, at any place of the main thread: a training loop may ask here too.
    """
    found = DEATH.search(str(error))
    if found is None:
        return None
    return UserError(
        f"a data worker died ({found[1]} {found[2].strip()}): probably out of memory or of shared memory (/dev/shm); "
        "try fewer --workers or a smaller --shuffle-buffer, and look into the system's log"
    )


class _Loader:
    """What both loaders share: raising what a worker sends, and the running count of skips.

    `skips`: counts by cause of the batches seen since iterating began or `reset_skips()`.
    """

    def __init__(self) -> None:
        self.skips: dict[str, int] = {}

    def reset_skips(self) -> None:
        self.skips = {}

    def _receive(self, items: Iterator[Any]) -> Iterator[Batch]:
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except RuntimeError as error:
                death = worker_death(error)
                if death is None:
                    raise
                raise death from error
            if isinstance(item, Failure):
                raise UserError(item.message)
            for cause, count in item.skipped.items():
                self.skips[cause] = self.skips.get(cause, 0) + count
            if isinstance(item, Batch):
                yield item


def _torch_loader(
    stream: IterableDataset[Any], num_workers: int, pin_memory: bool, persistent: bool
) -> DataLoader[Any]:
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=persistent and num_workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # or else each iteration draws from the generator that the model uses
    )


def _init_worker(_: int) -> None:
    """Signals are the main process's business: a forked worker would otherwise run its handlers."""
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


class TrainLoader(_Loader):
    """`num_batches` full batches an epoch, the same for every process.

    `num_samples` (over all processes) is rounded up as OpenCLIP does it: to whole global batches, and to the same
    number of batches for each worker. Where a consumer's part is used up, another pass over it begins.
    Raises UserError: no usable sample, too few shards, a dead worker.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Any], Tensor],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        num_workers: int,
        seed: int,
        rank: int,
        world_size: int,
        caption_keys: tuple[CaptionKey, ...],
        num_samples: int,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        shuffle_buffer: int = 5000,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        if num_samples < 1:
            raise UserError(f"--train-num-samples must be at least 1, got {num_samples}")
        workers = max(1, num_workers)
        source.check_consumers(workers * world_size)
        batches = math.ceil(num_samples / (batch_size * world_size))
        per_worker = math.ceil(batches / workers)
        self.num_batches = per_worker * workers
        self.num_samples = self.num_batches * batch_size * world_size
        self._epoch = multiprocessing.Value("q", 0)
        decoder = Decoder(transform, caption_keys, max_image_pixels)
        stream = TrainStream(
            source, decoder, tokenizer, batch_size, per_worker, seed, rank, world_size, shuffle_buffer, self._epoch
        )
        self._loader = _torch_loader(stream, num_workers, pin_memory, persistent=True)

    def set_epoch(self, epoch: int) -> None:
        """What order, captions and crops of the next iteration are drawn from; persistent workers see it too."""
        self._epoch.value = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        self.reset_skips()
        return self._receive(iter(self._loader))


class EvalLoader(_Loader):
    """Every sample exactly once over all processes and workers, the first caption of each; the last batch is partial.

    File order, in turns of the workers. `num_samples` stops after so many samples of the files, usable or not.
    Iterating gives this process's share; `full()` everything, for what runs on one process alone.
    Raises UserError if the whole set has no usable sample, or a worker dies.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Any], Tensor],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        num_workers: int,
        caption_keys: tuple[CaptionKey, ...],
        rank: int = 0,
        world_size: int = 1,
        num_samples: int | None = None,
        group_by: CaptionKey | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        self._parts = (source, Decoder(transform, caption_keys, max_image_pixels), tokenizer)
        self._batch_size = batch_size
        self._limit, self._group_by = num_samples, group_by
        self._rank, self._world_size = rank, world_size
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self.num_samples = num_samples or source.count() or 0

    def __iter__(self) -> Iterator[Batch]:
        return self.share(self._rank, self._world_size)

    def full(self) -> Iterator[Batch]:
        return self.share(0, 1)

    def share(self, rank: int, world_size: int) -> Iterator[Batch]:
        """The part of one process among so many."""
        self.reset_skips()
        stream = self._stream_of(rank, world_size)
        used = False
        for batch in self._receive(iter(_torch_loader(stream, self._num_workers, self._pin_memory, persistent=False))):
            used = True
            yield batch
        if not used and not (world_size > 1 and self._any_usable()):
            counts = describe(self.skips) or "no sample at all"
            raise UserError(
                f"the validation data has no usable sample ({counts}); look at --val-data and --caption-keys"
            )

    def _any_usable(self) -> bool:
        """Whether another process has what this one's share lacks; only looked for when that is empty."""
        return any(isinstance(item, Batch) for item in iter(self._stream_of(0, 1, batch_size=1)))

    def _stream_of(self, rank: int, world_size: int, batch_size: int | None = None) -> EvalStream:
        batch_size = batch_size or self._batch_size
        return EvalStream(*self._parts, batch_size, rank, world_size, self._limit, self._group_by)
