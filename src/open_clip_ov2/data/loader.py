"""Batches for training; those for evaluation are eval_loader.py's."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from open_clip_ov2.data.captions import CaptionKey
from open_clip_ov2.data.eval_loader import EvalLoader
from open_clip_ov2.data.order.resume import VERSION, Progress, Start, check_states, pack, start_from
from open_clip_ov2.data.order.share import Source
from open_clip_ov2.data.receive import Receiver, torch_loader, worker_death
from open_clip_ov2.data.samples import MAX_IMAGE_PIXELS, Decoder
from open_clip_ov2.data.skips import merged
from open_clip_ov2.data.stall import StallWatch, watched
from open_clip_ov2.data.streams import Batch, Tokenizer, TrainStream
from open_clip_ov2.errors import UserError

__all__ = ["Batch", "EvalLoader", "TrainLoader", "worker_death"]

STALL_WARNING_S = 60.0  # as often as the log's summaries of skips


class TrainLoader(Receiver):
    """`num_batches` full batches an epoch, the same for every process, whatever the number of workers.

    `num_samples` (over all processes) is rounded up to whole updates of `accum_freq` global batches. Where a
    consumer's part is used up, another pass over it begins. `state()` and `resume()`: where a killed run goes on.
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
        accum_freq: int = 1,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        shuffle_buffer: int = 5000,
        pin_memory: bool = False,
        stall_warning_s: float = STALL_WARNING_S,
    ) -> None:
        super().__init__(num_workers)
        if num_samples < 1:
            raise UserError(f"--train-num-samples must be at least 1, got {num_samples}")
        self._workers = max(1, num_workers)
        source.check_consumers(self._workers * world_size)
        self._asked, self._global_batch, self._accum_freq = num_samples, batch_size * world_size, accum_freq
        self.num_batches = self._batches_for(num_samples)
        self.num_samples = self.num_batches * self._global_batch
        self._stall_warning_s = stall_warning_s
        self._stream = TrainStream(
            source,
            Decoder(transform, caption_keys, max_image_pixels),
            tokenizer,
            batch_size,
            self.num_batches,
            seed,
            rank,
            world_size,
            shuffle_buffer,
            board=multiprocessing.RawArray("q", [-1] * self._workers),
        )
        self._make_loader = partial(torch_loader, num_workers=num_workers, pin_memory=pin_memory, persistent=True)
        self._loader = self._make_loader(self._stream)
        self._progress, self._resumed = self._progress_at(Start()), False

    def _batches_for(self, num_samples: int) -> int:
        return math.ceil(num_samples / (self._global_batch * self._accum_freq)) * self._accum_freq

    def _progress_at(self, start: Start, samples_done: int = 0) -> Progress:
        return Progress(start, self._stream.rank, self._workers, samples_done)

    @property
    def batches_done(self) -> int:
        """Batches delivered in this epoch, before a restart too."""
        return self._progress.batches_done

    def set_epoch(self, epoch: int) -> None:
        """What order, captions and crops of the next iteration are drawn from; persistent workers see it too."""
        if epoch != self._stream.epoch.value:
            self._stream.epoch.value, self._resumed = epoch, False
            self._progress = self._progress_at(Start())

    def __len__(self) -> int:
        return self.num_batches

    def close(self) -> None:
        """Ends the data workers. Left to the garbage collector they might be ended by a later, forked worker."""
        iterator = self._loader._iterator  # torch has no public name for it
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the epoch that is set; the first time after `resume()`, those of its epoch that are left."""
        if not self._resumed:
            self._stream.resuming.value = 0
            self._progress = self._progress_at(Start())
            self.reset_skips()
        self._resumed = False
        return self._deliver(iter(self._loader), self._progress)

    def _deliver(self, items: Iterator[Any], progress: Progress) -> Iterator[Batch]:
        first = progress.batches_done
        watch = StallWatch(
            self._stall_warning_s, lambda: self._reading((progress.batches_done - first) % self._workers)
        )
        for batch in self.receive(watched(items, watch)):
            progress.add(batch.position, self._global_batch)
            yield batch

    def _reading(self, batches: int) -> str:
        """What the worker reads whose turn it is after so many batches of this iteration."""
        worker = batches % self._workers
        index = self._stream.board[worker]
        return f"data worker {worker} " + (
            "has read nothing yet" if index < 0 else f"reads {self._stream.source.place(index)}"
        )

    def state(self) -> dict[str, Any]:
        """Where this process stands, after any batch: numbers and strings for a checkpoint.

        A restart needs the states of all processes. Batches that workers have ready but nobody took do not count.
        """
        done, stream = self._progress, self._stream
        return {
            **self._identity(),
            "version": VERSION,
            "epoch": int(stream.epoch.value),
            "rank": stream.rank,
            "world_size": stream.world_size,
            "workers": self._workers,
            "batch_size": stream.batch_size,
            "batches_done": done.batches_done,
            "samples_done": done.samples_done,
            "positions": pack(done.positions),
            # Of all consumers, and the same for every process.
            "history": [pack(generation) for generation in done.history] if stream.rank == 0 else [],
            "skips": dict(self.skips),
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._stream.seed,
            "shuffle_buffer": self._stream.shuffle_buffer,
            "data": self._stream.source.fingerprint(),
        }

    def resume(self, states: Sequence[dict[str, Any]], moved: bool = False) -> bool:
        """Goes on where `states`, of all processes in the order of their ranks, were taken: sets the epoch, and lets
        the next iteration give the batches that are left of it.

        True: exactly the batches that the old run would have seen. False, if the number of processes, of workers or
        the batch size is another one: other batches, but no sample of a pass is lost or comes twice (resampled data
        goes on with draws of its own). `moved`: see check_states.
        Raises UserError: other data, seed or shuffle buffer, or states missing.
        """
        check_states(states, self._identity(), moved)
        stream, old = self._stream, states[0]
        now = (stream.world_size, self._workers, stream.batch_size)
        same = now == (old["world_size"], old["workers"], old["batch_size"])
        left = self._batches_for(max(0, self._asked - old["samples_done"]))
        batches_done = min(self.num_batches, old["batches_done"]) if same else max(0, self.num_batches - left)
        start = start_from(states, stream.world_size * self._workers, stream.source.resampled, batches_done)
        self._resume_at(start, old)
        if same:
            self.skips = dict(states[stream.rank]["skips"])
        else:  # what nobody's part is any more is the first process's
            self.skips = merged(state["skips"] for state in states) if stream.rank == 0 else {}
        return same

    def _resume_at(self, start: Start, old: dict[str, Any]) -> None:
        stream = self._stream
        stream.start = start
        stream.epoch.value, stream.resuming.value = old["epoch"], 1
        self._progress, self._resumed = self._progress_at(start, old["samples_done"]), True
        self._loader = self._make_loader(stream)  # workers that are there have the old start
