"""The plain members of a tar, read without tarfile, whose Python spends as long on a header as a small JPEG takes.

Only what is plain beyond doubt: a regular file or folder with a short name and a right checksum, after a pax header of
times or none (POSIX.1-2017, pax, "ustar Interchange Format"). At anything else the bytes are given back and whoever
called goes on with tarfile, so that no judgement on odd or broken tars is made here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Protocol

BLOCK = 512
ZEROS = bytes(BLOCK)
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own entries, which it skips
_TIMES = re.compile(rb"(?:\d+ [amc]time=[-\d.]+\n)*\0*")
_OCTAL = re.compile(rb"0*([0-7]{1,11})[\0 ]*")


class Readable(Protocol):
    def read(self, size: int = -1) -> bytes: ...


class GivesBack:
    """A stream that takes bytes back."""

    def __init__(self, stream: Readable) -> None:
        self._stream, self._given = stream, b""
        self.given_back = False

    def __str__(self) -> str:  # webdataset puts it into its error messages
        return str(self._stream)

    def give_back(self, data: bytes) -> None:
        self._given, self.given_back = data + self._given, True

    def read(self, size: int = -1) -> bytes:
        if not self._given:
            return self._stream.read(size)
        data, self._given = (self._given, b"") if size < 0 else (self._given[:size], self._given[size:])
        return data + self._stream.read(size - len(data) if size >= 0 else -1)


def plain_members(stream: GivesBack, url: str) -> Iterator[dict[str, Any]]:
    """As webdataset's tar_file_expander gives them, up to the archive's end or the first member that is not plain.

    Then `stream` stands at its header, or is at its end.
    """
    header = stream.read(BLOCK)
    if not header:
        return stream.give_back(header)  # tarfile has a word for an empty file
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
            return stream.give_back(seen)
        padded = -(-size // BLOCK) * BLOCK
        data = stream.read(padded)
        if len(data) < padded:
            return stream.give_back(seen + data)
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
