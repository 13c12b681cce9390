"""Batches for training and evaluation.

Shapes: B batch, C channels, H and W pixels, L caption tokens.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from open_clip_ov2.data.captions import CaptionKey
from open_clip_ov2.data.samples import MAX_IMAGE_PIXELS, Decoder
from open_clip_ov2.data.skips import describe
from open_clip_ov2.data.sources import Source
from open_clip_ov2.data.streams import Batch, EvalStream, Failure, Tokenizer, TrainStream
from open_clip_ov2.errors import UserError

__all__ = ["Batch", "EvalLoader", "TrainLoader"]


class _Loader:
    """What both loaders share: raising what a worker sends, and the running count of skips."""

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
                if "DataLoader worker" not in str(error):
                    raise
                raise UserError(
                    f"a data worker died ({str(error).splitlines()[0]}): out of memory, or killed; try fewer --workers "
                    "or a smaller --shuffle-buffer"
                ) from error
            if isinstance(item, Failure):
                raise UserError(item.message)
            for cause, count in item.skipped.items():
                self.skips[cause] = self.skips.get(cause, 0) + count
            if isinstance(item, Batch):
                yield item


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
        self._loader: DataLoader[Any] = DataLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_init_worker,
        )

    def set_epoch(self, epoch: int) -> None:
        self._epoch.value = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        self.reset_skips()
        return self._receive(iter(self._loader))


class EvalLoader(_Loader):
    """Every sample exactly once over all processes and workers, in file order, the first caption of each.

    Iterating gives this process's share; `full()` everything, for what runs on one process alone.
    Raises UserError if the whole set has no usable sample.
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
        self._stream = (source, Decoder(transform, caption_keys, max_image_pixels), tokenizer, batch_size)
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
        stream = EvalStream(*self._stream, rank, world_size, self._limit, self._group_by)
        loader: DataLoader[Any] = DataLoader(
            stream,
            batch_size=None,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            worker_init_fn=_init_worker,
        )
        used = 0
        for batch in self._receive(iter(loader)):
            used += len(batch.keys)
            yield batch
        if not used and world_size == 1:
            counts = describe(self.skips) or "no sample at all"
            raise UserError(
                f"the validation data yields no usable sample ({counts}); look at --val-data and --caption-keys"
            )
