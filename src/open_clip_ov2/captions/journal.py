"""The lines of a sidecar that is being written, on disk as they come; a killed process loses none of them."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from open_clip_ov2.data.sidecars import write_sidecar
from open_clip_ov2.files import TEMPORARY, LineFile
from open_clip_ov2.locks import FolderLock

WORKING = ".writing"  # OUT/.writing/NAME holds the journal and the lock of one shard
LINES = "lines.jsonl"


class Journal:
    """A context in which no other process writes this sidecar; `lines` are those of before and those added.

    Raises InUse if another does, UserError if the folder cannot be used.
    """

    def __init__(self, folder: Path, shard: str, path: Path) -> None:
        self._folder, self._path = folder / WORKING / shard, path
        self._lock = FolderLock(self._folder)

    def __enter__(self) -> Journal:
        with contextlib.ExitStack() as opened:
            opened.enter_context(self._lock)
            for leftover in self._path.parent.glob(f"{TEMPORARY}{glob.escape(self._path.name)}.*"):
                leftover.unlink(missing_ok=True)  # of a process that was killed as it finished
            self._file = LineFile(self._folder / LINES)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        if self.finished:
            with contextlib.suppress(OSError):
                (self._folder / LINES).unlink()
        self._opened.close()
        for folder in (self._folder, self._folder.parent):  # where nothing is left in them
            with contextlib.suppress(OSError):
                folder.rmdir()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return self._file.lines

    @property
    def finished(self) -> bool:
        return self._path.is_file()

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines; they are on disk when this returns. Raises InUse if another process has taken over."""
        self._lock.check()
        self._file.add(*lines)

    def finish(self) -> None:
        """All lines are there: write the sidecar."""
        self._lock.check()
        write_sidecar(self._path, self.lines)


def in_work(folder: Path) -> Iterator[tuple[str, int]]:
    """(name of the shard, whole lines so far) of each sidecar that was begun and is not finished."""
    for path in sorted((folder / WORKING).glob(f"*/{LINES}")):
        with contextlib.suppress(OSError):
            yield path.parent.name, path.read_bytes().count(b"\n")
