"""`ov2 captions write`: a caption for each picture of many tars, by a model.

A shard is one task's alone, so tasks need not know of each other: task t of n takes shards t, t + n, ... Its lines go
to a journal, a batch at a time, and become the sidecar when all are there. Batches begin at the same samples after a
restart, and noise belongs to a sample, so that a stopped shard ends in the bytes that it would have had.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from open_clip_ov2.captions.engines import Engine, Prompts, Request, Sampler, row_sampling
from open_clip_ov2.captions.journal import WORKING, Journal, in_work
from open_clip_ov2.data.decode import bounded
from open_clip_ov2.data.samples import rgb_image
from open_clip_ov2.data.sidecars import missing_sidecars, shard_names, sidecar_path
from open_clip_ov2.data.skips import SkipSample
from open_clip_ov2.data.tars import read_tar
from open_clip_ov2.errors import Interrupted, InUse, UserError, first_line
from open_clip_ov2.train.signals import StopSignals

logger = logging.getLogger(__name__)
NO_TEXT = "the model wrote nothing"


class Task(NamedTuple):
    """Task `place`, from 0, of `tasks`."""

    place: int
    tasks: int


def task_here(environment: Mapping[str, str] = os.environ) -> Task:
    """The part of this process: of a SLURM array, of torchrun's or srun's processes, of both; else all there is."""
    rank, ranks = (int(environment.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if "RANK" not in environment:
        rank, ranks = int(environment.get("SLURM_PROCID", 0)), int(environment.get("SLURM_NTASKS", 1))
    least = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
    step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
    element = (int(environment.get("SLURM_ARRAY_TASK_ID", least)) - least) // step
    return Task(element * ranks + rank, ranks * int(environment.get("SLURM_ARRAY_TASK_COUNT", 1)))


def read_task(value: str) -> Task:
    """`0/4` to `3/4`. Raises UserError."""
    index, slash, count = value.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"{value!r}: expected T/N, for example 0/4 to 3/4 for four processes")
    return Task(int(index), int(count))


Prepared = tuple[str, Request | str]  # the key of a sample, and what the model is asked for it or why nothing is


@dataclass(frozen=True)
class Writing:
    """How captions are written. `workers`: threads that decode pictures ahead of the model. `wrote` gets the number of
    lines of each batch."""

    engine: Engine
    prompts: Prompts
    samplers: tuple[Sampler, ...]
    seed: int
    batch_size: int
    max_image_pixels: int
    workers: int
    wrote: Callable[[int], None] = lambda _: None

    def write(self, urls: Sequence[str], folder: Path, task: Task) -> None:
        """Write the sidecars of this task's shards that are missing in a set that was begun.

        Raises Interrupted when a signal came, InUse if others are still writing some of the shards, and UserError: the
        model fails on whole batches, a tar is broken (the other shards are written first).
        """
        names = list(shard_names(urls))[task.place :: task.tasks]
        missing = missing_sidecars(folder, urls)
        problems: list[str] = []
        with StopSignals() as signals, ThreadPoolExecutor(self.workers) as pool:
            for name in names:
                if name not in missing and not (folder / WORKING / name).is_dir():  # left by a kill at the end
                    continue
                try:
                    with Journal(folder, name, sidecar_path(folder, name)) as journal:
                        if not journal.finished:
                            problems += self._write_shard(missing[name], journal, pool, signals)
                except InUse as error:
                    logger.warning("%s", error)
                    problems.append(f"{name}: another process writes it")
        if problems:
            raise UserError(f"{len(problems)} of {len(names)} shards are not finished: {'; '.join(problems[:3])}")

    def _write_shard(self, url: str, journal: Journal, pool: ThreadPoolExecutor, signals: StopSignals) -> list[str]:
        """Write what is missing of one sidecar; what is wrong with its tar. Raises Interrupted."""
        broken: list[str] = []
        done, begun = len(journal.lines), time.monotonic()
        first = done - done % self.batch_size
        for start, batch in self._prepared(read_tar(url, broken.append), first, pool):
            for line, (key, _) in zip(journal.lines[start:], batch, strict=False):
                if line["key"] != key:
                    raise UserError(
                        f"{url}: its captions were begun with {line['key']!r} where it now has {key!r}; another tar of "
                        "this name? write into another folder"
                    )
            added = _lines(batch, self.engine)[len(journal.lines) - start :]
            journal.add(added)
            self.wrote(len(added))
            if signals.name is not None:
                raise Interrupted(
                    f"{signals.name}: {len(journal.lines)} captions of {url} are kept; the same command continues"
                )
        if broken:
            return [f"{url} is broken ({broken[0]}): repair it, or copy what can be read of it by `ov2 shards resize`"]
        journal.finish()
        errors, seconds = sum("error" in line for line in journal.lines), max(time.monotonic() - begun, 1e-9)
        logger.info(
            "%s: %s samples, %s without a caption, %.1f pictures/s", url, f"{len(journal.lines):,}", f"{errors:,}",
            (len(journal.lines) - done) / seconds,
        )  # fmt: skip
        return []

    def _prepared(
        self, samples: Iterable[dict[str, Any]], first: int, pool: ThreadPoolExecutor
    ) -> Iterator[tuple[int, list[Prepared]]]:
        """(place of its first sample, batch) from sample `first` on; each is decoded while the last is captioned."""
        ahead: tuple[int, list[Future[Prepared]]] | None = None
        remaining = itertools.islice(samples, first, None)
        for start in itertools.count(first, self.batch_size):
            submitted = [pool.submit(self._prepare, raw) for raw in itertools.islice(remaining, self.batch_size)]
            if ahead is not None:
                yield ahead[0], [one.result() for one in ahead[1]]
            if not submitted:
                return
            ahead = start, submitted

    def _prepare(self, raw: dict[str, Any]) -> Prepared:
        key = raw["__key__"]
        try:
            image = bounded(rgb_image(raw, self.max_image_pixels))
        except SkipSample as error:
            return key, error.cause
        prompt = self.prompts.of(raw, self.engine.special)
        return key, Request(key, image, prompt, row_sampling(self.samplers, self.seed, key))


def _lines(batch: Sequence[Prepared], engine: Engine) -> list[dict[str, Any]]:
    """A line for each sample. Raises UserError if the model fails on each of several samples."""
    found = _captioned([request for _, request in batch if isinstance(request, Request)], engine)
    failed = [line for line in found if line.get("error", NO_TEXT) != NO_TEXT]
    if len(failed) == len(found) > 1:
        raise UserError(f"the model fails on every picture of a batch: {failed[0]['error']}")
    for line in failed:
        logger.warning("no caption of %s: %s", line["key"], line["error"])
    written = iter(found)
    return [next(written) if isinstance(one, Request) else {"key": key, "error": one} for key, one in batch]


def _captioned(requests: Sequence[Request], engine: Engine) -> list[dict[str, Any]]:
    """A line for each request. A batch that fails is halved, down to the one sample that fails."""
    if not requests:
        return []
    try:
        texts = [text.strip() for text in engine.captions(requests)]
        if len(texts) != len(requests):
            raise ValueError(f"{len(texts)} captions of {len(requests)} pictures")
    except UserError:
        raise
    except Exception as error:
        if len(requests) == 1:
            return [{"key": requests[0].key, "error": f"{type(error).__name__}: {first_line(error)}"[:300]}]
        half = len(requests) // 2
        return _captioned(requests[:half], engine) + _captioned(requests[half:], engine)
    written = zip(requests, texts, strict=True)
    return [{"key": one.key, **({"caption": text} if text else {"error": NO_TEXT})} for one, text in written]


def standing(urls: Sequence[str], folder: Path) -> str:
    """Where a set stands, in a few lines. Raises UserError for a folder that is none."""
    missing, working = missing_sidecars(folder, urls), dict(in_work(folder))
    rows = [f"{folder}: {len(urls) - len(missing):,} of {len(urls):,} shards are finished"]
    rows += [f"{name}: {lines:,} captions so far" for name, lines in working.items() if name in missing]
    rows.append(f"{len(missing) - sum(name in missing for name in working):,} are not begun")
    return "\n".join(rows)
