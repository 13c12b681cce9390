"""Batches for training and for evaluation, in the main process.

Shapes: C channels, H and W pixels.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from open_clip_ov2.data.captions import CaptionKey, all_captions, group_text
from open_clip_ov2.data.decode import MAX_IMAGE_PIXELS
from open_clip_ov2.data.order.layout import Elastic, Layout
from open_clip_ov2.data.order.resume import VERSION, Progress, Start, check_states, pack, start_from
from open_clip_ov2.data.receive import Receiver, torch_loader, watched
from open_clip_ov2.data.samples import Decoder
from open_clip_ov2.data.skips import SkipCounter, SkipSample, merge_counts, nothing_usable
from open_clip_ov2.data.sources import Source
from open_clip_ov2.data.streams import Batch, EvalStream, Tokenizer, TrainStream
from open_clip_ov2.errors import UserError

__all__ = ["Batch", "EvalLoader", "TrainLoader"]

Watched = Callable[[Iterator[Batch]], Iterator[Batch]]
STALL_WARNING_S = 60.0  # as often as the log's summaries of skips


class TrainLoader(Receiver):
    """`num_batches` full batches an epoch, the same for every process, whatever the number of workers.

    `num_samples` (over all processes) is rounded up to whole updates of `accum_freq` global batches. When a consumer
    has read its part of the data, another pass begins. `state()` and `resume()` let a stopped run continue. With
    `elastic` global batches depend on it and on the seed, and not on the number of processes and workers, see Layout.
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
        prompt_keys: tuple[CaptionKey, ...] = (),
        elastic: Elastic | None = None,
        pin_memory: bool = False,
        stall_warning_s: float = STALL_WARNING_S,
    ) -> None:
        super().__init__(num_workers)
        if num_samples < 1:
            raise UserError(f"--train-num-samples {num_samples}: expected an integer >= 1")
        self._workers = max(1, num_workers)
        layout = Layout.of(elastic, batch_size, accum_freq, world_size, num_workers)
        source.check_consumers(layout.streams)
        self._asked, self._global_batch, self._accum_freq = num_samples, batch_size * world_size, accum_freq
        self.num_batches = self._batches_for(num_samples)
        self.num_samples = self.num_batches * self._global_batch
        self._stall_warning_s = stall_warning_s
        decoder = Decoder(transform, caption_keys, max_image_pixels, prompt_keys)
        self.stream = TrainStream(
            source, decoder, tokenizer, layout, elastic is not None, self.num_batches, seed, rank, shuffle_buffer,
            reading=multiprocessing.RawArray("q", [-1] * self._workers),
        )  # fmt: skip
        self._make_loader = partial(torch_loader, num_workers=num_workers, pin_memory=pin_memory, persistent=True)
        self._loader = self._make_loader(self.stream)
        self._progress, self._resumed = self._progress_at(Start()), False

    def _batches_for(self, num_samples: int) -> int:
        return math.ceil(num_samples / (self._global_batch * self._accum_freq)) * self._accum_freq

    def _progress_at(self, start: Start, samples_done: int = 0) -> Progress:
        layout = self.stream.layout
        return Progress(start, self.stream.rank, layout.streams // layout.processes, samples_done)

    @property
    def batches_done(self) -> int:
        """Batches delivered in this epoch, before a restart too."""
        return self._progress.batches_done

    def set_epoch(self, epoch: int) -> None:
        """Order, captions and crops of the next iteration depend on it; persistent workers see it too."""
        if epoch != self.stream.epoch.value:
            self.stream.epoch.value, self._resumed = epoch, False
            self._progress = self._progress_at(Start())

    def __len__(self) -> int:
        return self.num_batches

    def close(self) -> None:
        """End the data workers. Left to the garbage collector they might be ended by a later, forked worker."""
        iterator = self._loader._iterator  # torch has no public name for it
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the current epoch; the first time after `resume()`, those that are left of it."""
        if not self._resumed:
            self.stream.resuming.value = 0
            self._progress = self._progress_at(Start())
            self.reset_skips()
        self._resumed = False
        return self._deliver(iter(self._loader), self._progress)

    def _deliver(self, items: Iterator[Any], progress: Progress) -> Iterator[Batch]:
        first = progress.batches_done
        for batch in self.receive(watched(items, self._stall_warning_s, lambda: self._reading(progress, first))):
            progress.add(batch.positions, self._global_batch)
            yield batch

    def _reading(self, progress: Progress, first: int) -> str:
        """What the worker reads whose turn it is, in an iteration that began after `first` batches."""
        worker = (progress.batches_done - first) % self._workers
        index = self.stream.reading[worker]
        place = "has read nothing yet" if index < 0 else f"reads {self.stream.source.place(index)}"
        return f"data worker {worker} {place}"

    def state(self) -> dict[str, Any]:
        """Where this process stands, after any batch, as numbers and text for a checkpoint.

        To resume, the states of all processes are needed. Batches that workers have ready but nobody took do not count.
        """
        done, stream = self._progress, self.stream
        return {
            **self._identity(),
            "version": VERSION,
            "epoch": int(stream.epoch.value),
            "rank": stream.rank,
            "world_size": stream.layout.processes,
            "workers": self._workers,
            "batch_size": stream.layout.batch_size,
            "accum_freq": stream.layout.accum_freq,
            "order": stream.layout.order,
            "batches_done": done.batches_done,
            "samples_done": done.samples_done,
            "positions": pack(done.positions),
            # Of all consumers, and the same for every process.
            "history": [pack(positions) for positions in done.history] if stream.rank == 0 else [],
            "skips": dict(self.skips),
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.stream.seed,
            "shuffle_buffer": self.stream.shuffle_buffer,
            "data": self.stream.source.fingerprint(),
        }

    def resume(self, states: Sequence[dict[str, Any]], moved: bool = False) -> bool:
        """Continue where `states`, of all processes in the order of their ranks, were taken.

        Sets the epoch; the next iteration gives the batches that are left of it. True: exactly those of the old run,
        which with `elastic` is so for other numbers of processes and workers too. False: other batches, but no sample
        of a pass is lost or comes twice (resampled data draws anew). `moved`: see check_states.
        Raises UserError: other data, seed or shuffle buffer, or states missing.
        """
        check_states(states, self._identity(), moved)
        stream, layout, old = self.stream, self.stream.layout, states[0]
        old_order = old.get("order", [old["world_size"], old["workers"], old["batch_size"]])
        old_accum_freq, done = old.get("accum_freq", 1), old["batches_done"]
        same_cut = (layout.processes, layout.accum_freq) == (len(states), old_accum_freq)
        same = layout.order == old_order and (same_cut or done % old_accum_freq == 0)
        left = self._batches_for(max(0, self._asked - old["samples_done"]))
        done = min(self.num_batches, done * layout.accum_freq // old_accum_freq) if same else self.num_batches - left
        stream.start = start_from(states, layout.streams, stream.source.resampled, max(0, done))
        stream.epoch.value, stream.resuming.value = old["epoch"], 1
        self._progress, self._resumed = self._progress_at(stream.start, old["samples_done"]), True
        self._loader = self._make_loader(stream)  # running workers have the old start
        if same and layout.processes == len(states):
            self.skips = dict(states[stream.rank]["skips"])
        else:  # process 0 counts what no process can be given
            self.skips = merge_counts(state["skips"] for state in states) if stream.rank == 0 else {}
        return same


class Described(NamedTuple):
    """The text of a sample: `place` as in `Batch.indices`, all its captions, the value of the loader's `group_by`."""

    place: int
    key: str
    captions: tuple[str, ...]
    group: str


class EvalLoader(Receiver):
    """Every sample exactly once over all processes and workers, the first caption of each; the last batch is partial.

    File order, the workers in turns. `num_samples` stops after so many samples of the files, usable or not.
    Iterating gives this process's part; `full()` everything, for what runs on one process alone.
    Labeled sets need no captions: without `caption_keys` they are "", without a tokenizer `texts_BL` is `(B, 0)`.
    Raises UserError if the whole set has no usable sample, or a worker dies; `named`: what data it is, and its flag.
    `watched` passes on the batches of this process's part, and may end it early.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Any], Tensor],
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int,
        num_workers: int,
        caption_keys: tuple[CaptionKey, ...] = (),
        rank: int = 0,
        world_size: int = 1,
        num_samples: int | None = None,
        group_by: CaptionKey | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        prompt_keys: tuple[CaptionKey, ...] = (),
        pin_memory: bool = False,
        named: tuple[str, str] = ("validation", "--val-data"),
        watched: Watched | None = None,
    ) -> None:
        super().__init__(num_workers)
        self._named, self._watched = named, watched
        decoder = Decoder(transform, caption_keys, max_image_pixels, prompt_keys)
        self._stream = EvalStream(source, decoder, tokenizer, batch_size, rank, world_size, num_samples, group_by)
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self.num_samples = num_samples or source.count() or 0

    def fingerprint(self) -> dict[str, str | int | None]:
        """Identifies samples and groups; tokenizer and transform have no name and are left out."""
        stream, decoder = self._stream, self._stream.decoder
        settings = {"limit": stream.limit, "group_by": str(stream.group_by), "caption_keys": str(decoder.caption_keys)}
        return {**stream.source.fingerprint(), **settings, "max_image_pixels": decoder.max_image_pixels}

    def described(self) -> Iterator[Described]:
        """Every sample of the whole set in file order, without decoding its picture, which may prove unusable."""
        stream, keys = self._stream, self._stream.decoder.caption_keys
        for index, raw in enumerate(islice(stream.source.in_order(SkipCounter(log=False)), stream.limit)):
            captions: tuple[str, ...] = ()
            with contextlib.suppress(SkipSample):
                captions = tuple(all_captions(raw, keys)) if keys else ()
            yield Described(index, raw["__key__"], captions, group_text(raw, stream.group_by))

    def __iter__(self) -> Iterator[Batch]:
        batches = self._batches(self._stream)
        return batches if self._watched is None else self._watched(batches)

    def check(self) -> None:
        """Raises UserError if there is no usable sample; reads as far as the first, in this process."""
        self.reset_skips()
        if next(self.receive(self._one_by_one()), None) is None:
            raise nothing_usable(*self._named, self.skips, self.example)

    def full(self) -> Iterator[Batch]:
        return self._batches(replace(self._stream, rank=0, world_size=1))

    def _batches(self, stream: EvalStream) -> Iterator[Batch]:
        self.reset_skips()
        used = False
        for batch in self.receive(torch_loader(stream, self._num_workers, self._pin_memory, persistent=False)):
            used = True
            yield batch
        if not used and stream.world_size > 1:  # where this process has nothing usable, another one may
            used = any(isinstance(item, Batch) and item.keys for item in self._one_by_one())
        if not used:
            raise nothing_usable(*self._named, self.skips, self.example)

    def _one_by_one(self) -> EvalStream:
        return replace(self._stream, batch_size=1, rank=0, world_size=1)
