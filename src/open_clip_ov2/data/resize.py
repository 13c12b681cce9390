"""Many tars to a folder of the same tars with smaller images; a stopped resize continues where it was.

The folder's ledger, resize.jsonl, has one line of settings and one for each finished shard; a shard without a line is
made again. sizes.json is written last, so a folder that has it is complete.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from open_clip_ov2.data.shrink import ShardReport, Shrink, shrink_shard
from open_clip_ov2.data.sidecars import CaptionSet, begin_set, shard_names
from open_clip_ov2.errors import UserError
from open_clip_ov2.files import TEMPORARY, write_json
from open_clip_ov2.locks import LOCK, FolderLock

LEDGER, SIZES = "resize.jsonl", "sizes.json"


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
        if self.folder.is_dir():
            self._refuse_other_files()
        with contextlib.ExitStack() as opened:
            opened.enter_context(FolderLock(self.folder))
            self._ledger = opened.enter_context(open(self.folder / LEDGER, "a+", encoding="utf-8"))
            for name in filter(_is_unfinished, os.listdir(self.folder)):
                (self.folder / name).unlink()
            self._read_ledger()
            for one in self.captions:
                begin_set(self.folder / one.name, {"resized": one.settings()})
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _refuse_other_files(self) -> None:
        present = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith(LOCK))
        if LEDGER in present:
            sets = (one.name for one in self.captions)
            known = {LEDGER, SIZES, *sets, *self._names, *(entry.get("name", "") for entry in self._entries())}
            present = [name for name in present if name not in known and not _is_unfinished(name)]
        if present:
            raise UserError(f"{self.folder}: holds other files ({', '.join(present[:3])}); name a folder of its own")

    def _entries(self) -> list[dict[str, Any]]:
        """The ledger's whole lines, without what a kill left of the last one."""
        path = self.folder / LEDGER
        try:
            return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        except ValueError:
            raise UserError(f"{path}: damaged; start again in another folder") from None

    def _read_ledger(self) -> None:
        entries, wanted = self._entries(), asdict(self.shrink)
        if self.captions:
            wanted["captions"] = [one.name for one in self.captions]
        self._ledger.truncate((self.folder / LEDGER).read_bytes().rfind(b"\n") + 1)
        if not entries:
            return self._append({"settings": wanted})
        found = entries[0]["settings"]
        if found != wanted:
            differ = [f"{key} {found.get(key)}, not {wanted.get(key)}" for key in found | wanted
                      if wanted.get(key) != found.get(key)]  # fmt: skip
            raise UserError(f"{self.folder}: was begun with {', '.join(differ)}; give the same, or name another folder")
        for report in (ShardReport(**entry) for entry in entries[1:]):
            if self._is_whole(report):  # another one is made again
                self.reports[report.name] = report
        for name, url in self._names.items():
            if name in self.reports and self.reports[name].source != url:
                raise UserError(
                    f"{self.folder / name}: was made of {self.reports[name].source}, not of {url}; name another folder"
                )

    def _is_whole(self, report: ShardReport) -> bool:
        path = self.folder / report.name
        return path.is_file() and path.stat().st_size == report.bytes_out

    def _append(self, line: dict[str, Any]) -> None:
        try:
            self._ledger.write(json.dumps(line) + "\n")
            self._ledger.flush()
        except OSError as error:
            raise UserError(
                f"{self.folder / LEDGER}: {error.strerror}; free some space and run the same command"
            ) from error

    @property
    def left(self) -> list[tuple[str, str]]:
        """(new name, source) of shards not made yet."""
        return [(name, url) for name, url in self._names.items() if name not in self.reports]

    def run(self, workers: int) -> Iterator[ShardReport]:
        """Make what is left, a shard at a time in each process. Raises UserError."""
        jobs = [(url, self.folder / name, self.shrink, self.captions) for name, url in self.left]
        for report in in_processes(shrink_shard, jobs, workers):
            self.reports[report.name] = report
            self._append(asdict(report))
            yield report

    def finish(self) -> dict[str, int]:
        """Write sizes.json for all shards in the folder. Raises UserError if one is missing or has changed."""
        for name, report in self.reports.items():
            if not self._is_whole(report):
                raise UserError(f"{self.folder / name}: gone or changed since it was written; run the same command")
        sizes = {name: report.samples_out for name, report in sorted(self.reports.items())}
        write_json(self.folder / SIZES, sizes)
        return sizes


def _is_unfinished(name: str) -> bool:
    """Whether a file is what a killed resize left; releases before 0.1 wrote `.NAME.part`."""
    return name.startswith(TEMPORARY) or (name.startswith(".") and name.endswith(".part"))


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
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
