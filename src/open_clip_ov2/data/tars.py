"""The raw samples of one tar. webdataset opens it (also what storage.py opens) and groups its files into samples.

Plain tars are read without tarfile, whose Python spends as long on a header as a small JPEG takes. Plain means beyond
doubt: regular files and folders with short names and right checksums, after a pax header of times or none
(POSIX.1-2017, pax, "ustar Interchange Format"). At anything else the bytes are put back and tarfile continues, so that
odd and broken tars are judged by tarfile alone.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

from open_clip_ov2.data.sidecars import CaptionSet, with_lines
from open_clip_ov2.data.storage import abandon

BLOCK = 512  # bytes; a tar ends with two blocks of zeros, of which Python reads at least one
ZEROS = bytes(BLOCK)
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # gzip, bzip2, xz: their own checksums notice a break
APART = "the files of a sample must follow one another: write the tar with tar --sort=name"
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own entries, which it skips
_TIMES = re.compile(rb"(?:\d+ [amc]time=[-\d.]+\n)*\0*")
_OCTAL = re.compile(rb"0*([0-7]{1,11})[\0 ]*")


def read_tar(
    url: str, on_broken: Callable[[str], None], captions: Sequence[CaptionSet] = ()
) -> Generator[dict[str, Any], None, None]:
    """A tar's samples: `__key__`, `__url__`, bytes by suffix, and the line of each caption set by the set's name.

    `on_broken` is called once with the reason if the tar breaks off, has a name twice, or has the files of a sample
    apart (APART), or if a sidecar cannot be read; what could be read is used. Raises UserError for another tar's
    captions.
    """
    samples = _read_tar(url, on_broken)
    with contextlib.closing(samples):
        yield from with_lines(samples, url, captions, on_broken) if captions else samples


def _read_tar(url: str, on_broken: Callable[[str], None]) -> Generator[dict[str, Any], None, None]:
    problems: list[str] = []
    suffixes: dict[str, set[str]] = {}

    def note(error: Exception) -> bool:
        problems.append(f"{type(error).__name__}: {error.args[0] if error.args else error}")
        return True

    for opened in url_opener([{"url": url}], handler=note):
        with TarStream(opened["stream"], url) as stream:
            for sample in group_by_keys(_files(stream, url, note), handler=note):
                before, key = suffixes.setdefault(sample["__key__"], set()), sample["__key__"]
                if before and before.isdisjoint(sample) and not problems:
                    problems.append(f"{key} comes in parts; {APART}")
                before |= {name for name in sample if not name.startswith("__")}
                yield sample
            if stream.ended_early():
                problems.append("a damaged header, or no end of archive: what follows is not read")
    if problems:
        on_broken(problems[0])


class TarStream:
    """A stream that takes bytes back and remembers how it began and ended; `with` closes it.

    tarfile silently takes a damaged header for the end of the archive. A tar that was read to its end had zeros last.
    """

    def __init__(self, stream: Any, url: str) -> None:
        self._stream, self._url = stream, url
        self._head = self._tail = self._returned = b""
        self.put_back_some = False

    def __str__(self) -> str:  # webdataset puts it into its error messages
        return self._url

    def __enter__(self) -> TarStream:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is not None:
            return abandon(self._stream)
        with contextlib.suppress(Exception):  # a pipe's exit status; what matters of it showed while reading
            self._stream.close()

    def read(self, size: int = -1) -> bytes:
        if not self._returned:
            return self._read_on(size)
        end = len(self._returned) if size < 0 else size
        data, self._returned = self._returned[:end], self._returned[end:]
        return data + self._read_on(size - len(data) if size >= 0 else -1)

    def put_back(self, data: bytes) -> None:
        self._returned, self.put_back_some = data + self._returned, True

    def ended_early(self) -> bool:
        return not self._head.startswith(COMPRESSED) and any(self._tail)

    def _read_on(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        if len(self._head) < 8:
            self._head += data[: 8 - len(self._head)]
        self._tail = data[-BLOCK:] if len(data) >= BLOCK else (self._tail + data)[-BLOCK:]
        return data


def _files(stream: TarStream, url: str, note: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """The plain files fast, and the rest, if there is one, as webdataset reads it."""
    try:
        yield from plain_files(stream, url)
    except Exception as error:  # a pipe's exit status, a disk's error
        note(error)
        return
    if stream.put_back_some:
        yield from tar_file_expander([{"url": url, "stream": stream}], handler=note)


def plain_files(stream: TarStream, url: str) -> Iterator[dict[str, Any]]:
    """As webdataset's tar_file_expander gives them, up to the archive's end or the first that is not plain.

    Then `stream` stands at its header, or is at its end.
    """
    header = stream.read(BLOCK)
    if not header:
        return stream.put_back(header)  # let tarfile report an empty file
    while header not in (ZEROS, b""):
        seen = header
        kind, size = _kind_and_size(header)
        if kind == b"x" and size <= BLOCK:
            times, header = stream.read(BLOCK), stream.read(BLOCK)
            seen += times + header
            kind, size = _kind_and_size(header) if _TIMES.fullmatch(times) else (b"", 0)
        name = header[:100].rstrip(b"\0")
        if kind == b"5" and not size:
            header = stream.read(BLOCK)
            continue
        if kind != b"0" or b"\0" in name or name.endswith(b"/"):
            return stream.put_back(seen)
        padded = -(-size // BLOCK) * BLOCK
        data = stream.read(padded)
        if len(data) < padded:
            return stream.put_back(seen + data)
        text = name.decode("utf-8", "surrogateescape")
        if not _META.match(text):
            yield {"fname": text, "data": data[:size], "__url__": url}
        header = stream.read(BLOCK)


def _kind_and_size(header: bytes) -> tuple[bytes, int]:
    """The type (`0` for the old NUL too) and size in bytes; no type where anything is out of the ordinary."""
    size, checksum = _OCTAL.fullmatch(header[124:136]), _OCTAL.fullmatch(header[148:156])
    if len(header) < BLOCK or size is None or checksum is None or header[345:] != bytes(BLOCK - 345):
        return b"", 0
    if int(checksum[1], 8) != sum(header) - sum(header[148:156]) + 8 * 32:  # it counts as spaces
        return b"", 0
    return header[156:157].replace(b"\0", b"0"), int(size[1], 8)
