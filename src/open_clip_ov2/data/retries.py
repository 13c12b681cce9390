"""Reading from object stores: after an error that may pass, once more after a wait. The stores' own retries come on
top."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from collections.abc import Callable
from typing import IO, Any, TypeVar

import fsspec

from open_clip_ov2.errors import first_line

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
WAITS_S = (0.5, 1.0, 2.0, 4.0)  # between attempts to read at one place
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError)
BUFFER = 1 << 20  # bytes that are asked for at once


def retried(what: str, act: Callable[[], Found]) -> Found:
    """What `act` gives; after an error that may pass, once more after a wait, at most len(WAITS_S) times."""
    for wait_s in WAITS_S:
        try:
            return act()
        except PERMANENT:
            raise
        except Exception as error:
            logger.info("%s: %s; once more in %g s", what, first_line(error), wait_s)
            time.sleep(wait_s)
    return act()


class StoredFile(io.RawIOBase):
    """A file of an object store, to be read; after an error it is opened anew and read on from the same place."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address, self._place = address, 0
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence != os.SEEK_END
        self._place = offset + (self._place if whence == os.SEEK_CUR else 0)
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = retried(f"{self._address} at byte {self._place}", lambda: self._read(len(buffer)))
        self._place += len(data)
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                fs, path = fsspec.url_to_fs(self._address)
                self._file = fs.open(path, "rb", block_size=BUFFER)
            self._file.seek(self._place)
            data: bytes = self._file.read(size)
            return data
        except Exception:
            self._drop()
            raise

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):  # it is broken already
                file.close()

    def close(self) -> None:
        self._drop()
        super().close()


def open_stored(address: str, mode: str = "rb", bufsize: int = -1) -> IO[bytes]:
    """webdataset's interface; the first bytes are read at once, so that a missing file is an error of opening."""
    file = io.BufferedReader(StoredFile(address), BUFFER)
    file.peek(1)
    return file


class RetryingStore(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """The store of an address, for libraries that take a file system of fsspec's: reads are retried as everywhere."""

    cachable = False

    def __init__(self, address: str) -> None:
        super().__init__()
        self._store = fsspec.url_to_fs(address)[0]
        self.protocol = self._store.protocol

    def open(self, path: str, *_: Any, **__: Any) -> StoredFile:
        return StoredFile(self._store.unstrip_protocol(path))

    def info(self, path: str, **_: Any) -> Any:
        return retried(path, lambda: self._store.info(path))

    def glob(self, path: str, **_: Any) -> Any:
        return retried(path, lambda: self._store.glob(path))

    def modified(self, path: str) -> Any:
        return retried(path, lambda: self._store.modified(path))
