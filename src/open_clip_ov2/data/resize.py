"""Many tars -> a folder of the same with smaller pictures, in any number of sittings.

The folder's ledger, resize.jsonl, has one line of settings and one for each shard that is whole; a shard that has no
line is made again. sizes.json comes last, so that a folder with it is complete.
"""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from open_clip_ov2.data.shrink import ShardReport, Shrink, shrink_shard
from open_clip_ov2.errors import UserError

logger = logging.getLogger(__name__)

LEDGER, SIZES = "resize.jsonl", "sizes.json"


def target_names(urls: Sequence[str]) -> dict[str, str]:
    """Name of each new shard -> where it comes from. Raises UserError: no name to be had, or one twice."""
    names: dict[str, str] = {}
    for url in urls:
        name = url.split()[-1].rsplit("/", 1)[-1].strip("'\"")
        for ending in (".gz", ".tgz"):
            name = name.removesuffix(ending)
        name = name if name.endswith(".tar") else f"{name}.tar"
        if name.startswith(".") or not name.removesuffix(".tar"):
            raise UserError(f"{url}: does not end in a tar's name, which its smaller copy is to have")
        if name in names:
            raise UserError(f"{url} and {names[name]} have the same name; resize them into folders of their own")
        names[name] = url
    return names


@dataclass
class Resize:
    """Use as a context: the folder is then nobody else's. Raises UserError: a folder with other things in it, or with
    shards of other settings or other sources; a second process at it."""

    urls: Sequence[str]
    folder: Path
    shrink: Shrink
    reports: dict[str, ShardReport] = field(default_factory=dict)

    def __enter__(self) -> Resize:
        self._names = target_names(self.urls)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be made ({error.strerror}); name another folder") from error
        self._refuse_other_things()
        self._ledger = open(self.folder / LEDGER, "a+", encoding="utf-8")
        try:
            self._lock()
            self._read_ledger()
        except BaseException:
            self._ledger.close()
            raise
        return self

    def _lock(self) -> None:
        try:
            fcntl.flock(self._ledger, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: another process is resizing into it; wait for it") from None
        except OSError as error:  # Lustre without -o flock, some NFS
            logger.warning("%s: no locks there (%s), so start this command once at a time", self.folder, error.strerror)

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ledger.close()

    def _refuse_other_things(self) -> None:
        there = sorted(path.name for path in self.folder.iterdir())
        known = {LEDGER, SIZES, f".{SIZES}.part", *self._names, *(f".{name}.part" for name in self._names)}
        if LEDGER in there:
            known |= {entry.get("name", "") for entry in self._entries()}
        other = [name for name in there if name not in known or (LEDGER not in there)]
        if other:
            raise UserError(f"{self.folder}: holds other things ({', '.join(other[:3])}); name a folder of its own")

    def _whole_lines(self) -> list[str]:
        """Without what a kill left of the last one."""
        return (self.folder / LEDGER).read_text("utf-8").split("\n")[:-1]

    def _entries(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in self._whole_lines()]
        except ValueError:
            raise UserError(f"{self.folder / LEDGER}: damaged; begin anew in another folder") from None

    def _read_ledger(self) -> None:
        lines = self._whole_lines()
        self._ledger.truncate(sum(len(line.encode()) + 1 for line in lines))
        if not lines:
            return self._append({"settings": asdict(self.shrink)})
        entries = self._entries()
        before = entries[0]["settings"]
        if before != asdict(self.shrink):
            asked = asdict(self.shrink)
            said = ", ".join(
                f"{key} {before.get(key)}, not {asked[key]}" for key in asked if asked[key] != before.get(key)
            )
            raise UserError(f"{self.folder}: was begun with {said}; say the same, or name another folder")
        for entry in entries[1:]:
            report, path = ShardReport(**entry), self.folder / entry["name"]
            if path.is_file() and path.stat().st_size == report.bytes_out:  # another one is made again
                self.reports[report.name] = report
        for name, url in self._names.items():
            if name in self.reports and self.reports[name].source != url:
                raise UserError(
                    f"{self.folder / name}: was made of {self.reports[name].source}, not of {url}; name another folder"
                )

    def _append(self, line: dict[str, Any]) -> None:
        try:
            self._ledger.write(json.dumps(line) + "\n")
            self._ledger.flush()
        except OSError as error:
            raise UserError(f"{self.folder / LEDGER}: {error.strerror}; free some space, same command") from error

    @property
    def left(self) -> list[tuple[str, str]]:
        """(new name, source) of shards not made yet."""
        return [(name, url) for name, url in self._names.items() if name not in self.reports]

    def run(self, workers: int) -> Iterator[ShardReport]:
        """Makes what is left, a shard at a time in each process. Raises UserError."""
        jobs = [(url, self.folder / name, self.shrink) for name, url in self.left]
        for report in _in_processes(jobs, workers) if workers > 1 else (shrink_shard(*job) for job in jobs):
            self.reports[report.name] = report
            self._append(asdict(report))
            yield report

    def finish(self) -> dict[str, int]:
        """Writes sizes.json, of all shards in the folder. Raises UserError if one is missing or has changed."""
        for name, report in self.reports.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != report.bytes_out:
                raise UserError(f"{path}: gone or changed since it was written; the same command makes it again")
        sizes = {name: report.samples_out for name, report in sorted(self.reports.items())}
        part = self.folder / f".{SIZES}.part"
        part.write_text(json.dumps(sizes, indent=1) + "\n")
        part.replace(self.folder / SIZES)
        return sizes


def _in_processes(jobs: Sequence[tuple[str, Path, Shrink]], workers: int) -> Iterator[ShardReport]:
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([shrink_shard.__module__])  # torch is imported once, not by each
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_the_parent)
    try:
        for done in as_completed([pool.submit(shrink_shard, *job) for job in jobs]):
            yield done.result()
    except BrokenProcessPool as error:
        raise UserError("a process was killed (out of memory?); try fewer --workers, same command") from error
    finally:  # also when the consumer stops early, by Ctrl-C or an error: nobody waits for shards half done
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()


def _follow_the_parent() -> None:
    """Ctrl-C is for the parent; and where it is killed, none goes on writing what the next command writes anew."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
