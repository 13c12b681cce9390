"""The raw samples of one tar. Opening (also `pipe:` and `https:`), reading and grouping are webdataset's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

from webdataset.gopen import Pipe
from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

from open_clip_ov2.data.members import GivesBack, plain_members
from open_clip_ov2.data.skips import BROKEN_SHARD, SkipCounter

TAR_BLOCK = 512  # bytes; a tar ends with two blocks of zeros (POSIX pax), of which Python reads at least one
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # gzip, bzip2, xz: their own checksums notice a break


class _Watched:
    """A stream that remembers how it began and ended, closed by `with`.

    tarfile takes a damaged header for the end of the archive, without a word. A tar that was read to its end had
    zeros last.
    """

    def __init__(self, stream: Any, url: str) -> None:
        self._stream, self._url = stream, url
        self._head = self._tail = b""

    def __str__(self) -> str:  # webdataset puts it into its error messages
        return self._url

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is not None and isinstance(self._stream, Pipe):
            self._stream.proc.terminate()  # what it still has to say is not waited for
        with contextlib.suppress(Exception):  # a pipe's exit status; what matters of it showed while reading
            self._stream.close()

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)
        if len(self._head) < 8:
            self._head += data[: 8 - len(self._head)]
        self._tail = data[-TAR_BLOCK:] if len(data) >= TAR_BLOCK else (self._tail + data)[-TAR_BLOCK:]
        return data

    def ended_early(self) -> bool:
        return not self._head.startswith(COMPRESSED) and any(self._tail)


def _files(watched: _Watched, url: str, note: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """The plain members fast, and the rest, if there is one, as webdataset reads it."""
    stream = GivesBack(watched)
    try:
        yield from plain_members(stream, url)
    except Exception as error:  # a pipe's exit status, a disk's error
        note(error)
        return
    if stream.given_back:
        yield from tar_file_expander([{"url": url, "stream": stream}], handler=note)


def read_tar(url: str, skips: SkipCounter) -> Generator[dict[str, Any], None, None]:
    """A tar's samples. One that breaks off, or has a name twice, is counted once; what could be read is used."""
    broken: list[str] = []

    def note(error: Exception) -> bool:
        if not broken:
            broken.append(f"{type(error).__name__}: {error.args[0] if error.args else error}")
        return True

    early = False
    for opened in url_opener([{"url": url}], handler=note):
        with _Watched(opened["stream"], url) as watched:
            yield from group_by_keys(_files(watched, url, note), handler=note)
            early = watched.ended_early()
    if early and not broken:
        broken.append("a damaged header, or no end of archive: what follows is not read")
    if broken:
        skips.add(BROKEN_SHARD, broken[0], "", url)
