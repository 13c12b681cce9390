"""Tars to a folder of the same tars with smaller images, every other entry byte for byte; a stopped resize continues
where it was.

The folder's ledger, resize.jsonl, has one line of settings and one for each finished shard; a shard without a line is
made again. sizes.json is written last, so a folder that has it is complete.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from open_clip_ov2.data.decode import EncodedImage, pil_errors_skip
from open_clip_ov2.data.samples import IMAGE_SUFFIXES
from open_clip_ov2.data.sidecars import (
    CaptionSet,
    begin_set,
    check_same_settings,
    refuse_other_files,
    shard_names,
    sidecar_path,
    write_sidecar,
)
from open_clip_ov2.data.skips import BROKEN_SHARD, DOTTED, MISSING_IMAGE, SkipSample, missing
from open_clip_ov2.data.tars import APART, read_tar
from open_clip_ov2.errors import UserError
from open_clip_ov2.files import TEMPORARY, LineFile, write_errors, write_json, written_whole
from open_clip_ov2.locks import FolderLock

LEDGER, SIZES = "resize.jsonl", "sizes.json"
KINDS = ("JPEG", "PNG", "WEBP")  # images of other formats become JPEG


@dataclass(frozen=True)
class Shrink:
    """`short_side` in px: smaller images are copied. `quality`: of JPEG and WebP, 1 to 95."""

    short_side: int
    quality: int
    max_image_pixels: int


@dataclass(frozen=True)
class ShardReport:
    """Samples in and out, bytes of the new tar, and what was dropped: (key, cause, detail)."""

    name: str
    source: str
    samples_in: int
    samples_out: int
    bytes_out: int
    dropped: tuple[tuple[str, str, str], ...]
    broken: str = ""


def shrink_shard(source: str, target: Path, shrink: Shrink, captions: Sequence[CaptionSet] = ()) -> ShardReport:
    """Write `target` whole or not at all, after its sidecars in a folder beside it for each caption set. Raises
    UserError if it cannot be written."""
    with write_errors(target), written_whole(target) as file:
        return _write(source, target, file, shrink, captions)


def _write(source: str, target: Path, file: IO[bytes], shrink: Shrink, captions: Sequence[CaptionSet]) -> ShardReport:
    broken: list[str] = []
    dropped, samples_in = [], 0
    lines: dict[str, list[Any]] = {one.name: [] for one in captions}
    with tarfile.open(fileobj=file, mode="w") as tar:
        for samples_in, sample in enumerate(read_tar(source, broken.append, captions), 1):  # noqa: B007
            found = {one: sample.pop(one) for one in lines}
            try:
                entries = shrunk_entries(sample, shrink)
            except SkipSample as error:
                dropped.append((sample["__key__"], error.cause, error.detail))
                continue
            for one, line in found.items():
                lines[one].append(json.loads(line))
            for suffix, data in entries.items():
                info = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    misnamed = [f"{key}: {cause} ({detail})" for key, cause, detail in dropped if DOTTED in detail]
    if refused := [reason for reason in broken if APART in reason] + misnamed:  # whose captions would be lost
        raise UserError(f"{source}: {refused[0]}")
    if not samples_in and broken:
        raise UserError(f"{source}: {BROKEN_SHARD}, nothing in it can be read ({broken[0]}); repair it or leave it out")
    for one, kept in lines.items():
        write_sidecar(sidecar_path(target.parent / one, target.name), kept)
    written = samples_in - len(dropped)
    return ShardReport(target.name, source, samples_in, written, file.tell(), tuple(dropped), "".join(broken[:1]))


def shrunk_entries(sample: Mapping[str, Any], shrink: Shrink) -> dict[str, bytes]:
    """A sample's entries by suffix, its images smaller. Raises SkipSample: no image, or one that is broken."""
    entries = {suffix: data for suffix, data in sample.items() if not suffix.startswith("__")}
    images = [suffix for suffix in entries if suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise missing(MISSING_IMAGE, entries, IMAGE_SUFFIXES)
    return entries | {suffix: shrunk_image(entries[suffix], shrink) for suffix in images}


def shrunk_image(data: bytes, shrink: Shrink) -> bytes:
    """The image upright, its short side at most `short_side`, without metadata; JPEG unless it is PNG or WebP.

    Nothing is enlarged; what needs neither turning nor shrinking stays as it is. Raises SkipSample.
    """
    encoded = EncodedImage(data, shrink.max_image_pixels)
    small = encoded.shrunk(shrink.short_side)
    if small is None:
        return data
    kind, buffer = encoded.format if encoded.format in KINDS else "JPEG", io.BytesIO()
    with pil_errors_skip(shrink.max_image_pixels):
        small.save(buffer, kind, quality=shrink.quality, exif=b"", optimize=True)
    return buffer.getvalue()


@dataclass
class Resize:
    """A context in which no other process resizes into the folder.

    Raises UserError: a folder that holds other files, or shards of other settings or sources; a second process.
    """

    urls: Sequence[str]
    folder: Path
    shrink: Shrink
    captions: tuple[CaptionSet, ...] = ()
    reports: dict[str, ShardReport] = field(default_factory=dict)

    def __enter__(self) -> Resize:
        for one in self.captions:
            one.check(self.urls)
        self._names = {f"{name}.tar": url for name, url in shard_names(self.urls).items()}
        if self.folder.is_dir() and not (self.folder / LEDGER).is_file():
            refuse_other_files(self.folder)
        with contextlib.ExitStack() as opened:
            opened.enter_context(FolderLock(self.folder))
            for unfinished in self.folder.glob(f"{TEMPORARY}*"):
                unfinished.unlink()
            self._ledger = LineFile(self.folder / LEDGER)
            self._read_ledger()
            for one in self.captions:
                begin_set(self.folder / one.name, {"resized": one.settings()})
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _read_ledger(self) -> None:
        wanted = asdict(self.shrink)
        if self.captions:
            wanted["captions"] = [one.name for one in self.captions]
        if not self._ledger.lines:
            self._ledger.add({"settings": wanted})
        begin, *entries = self._ledger.lines
        check_same_settings(self.folder, begin["settings"], wanted)
        for report in (ShardReport(**entry) for entry in entries):
            path = self.folder / report.name
            if path.is_file() and path.stat().st_size == report.bytes_out:  # another one is made again
                self.reports[report.name] = report
        for name, url in self._names.items():
            if name in self.reports and self.reports[name].source != url:
                raise UserError(
                    f"{self.folder / name}: was made of {self.reports[name].source}, not of {url}; name another folder"
                )

    @property
    def left(self) -> list[tuple[str, str]]:
        """(new name, source) of shards not made yet."""
        return [(name, url) for name, url in self._names.items() if name not in self.reports]

    def run(self, workers: int) -> Iterator[ShardReport]:
        """Make what is left, a shard at a time in each process. Raises UserError."""
        jobs = [(url, self.folder / name, self.shrink, self.captions) for name, url in self.left]
        for report in in_processes(shrink_shard, jobs, workers):
            self.reports[report.name] = report
            self._ledger.add(asdict(report))
            yield report

    def finish(self) -> dict[str, int]:
        """Write sizes.json for all shards in the folder."""
        sizes = {name: report.samples_out for name, report in sorted(self.reports.items())}
        write_json(self.folder / SIZES, sizes)
        return sizes


def in_processes(work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """What `work` returns for each job as it is done; one worker is this process. Raises UserError."""
    if workers == 1:
        yield from (work(*job) for job in jobs)
        return
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])  # torch is imported once, not by each
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_the_parent)
    try:
        for done in as_completed([pool.submit(work, *job) for job in jobs]):
            yield done.result()
    except BrokenProcessPool as error:
        raise UserError("a process was killed (out of memory?); try fewer --workers with the same command") from error
    finally:  # also when the consumer stops early, by Ctrl-C or an error: do not wait for unfinished shards
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()


def _follow_the_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it is killed, so that nothing writes what the next command writes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
