"""Files that are written whole or not at all, and JSON that is read with a one-line error."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from open_clip_ov2.errors import UserError

TEMPORARY = ".tmp-"  # the name of a file that is not finished begins with this


@contextlib.contextmanager
def written_whole(path: Path, *, sync: bool = True) -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` when the block ends; if it fails or the process is killed, `path` is unchanged.

    With `sync`, content and name are on disk when the block has ended. Raises OSError.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """The whole text in UTF-8 or, if the process is killed, what was there before. Raises OSError."""
    with written_whole(path, sync=sync) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any, *, sync: bool = True) -> None:
    """`value` as indented JSON, whole or not at all. Raises OSError."""
    write_text(path, json.dumps(value, indent=1) + "\n", sync=sync)


def read_json(path: Path, kind: type | tuple[type, ...] = (dict, list), what: str = "JSON") -> Any:
    """The content of a JSON file, of type `kind`. Raises UserError, which says that `what` was expected."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # -sig: Windows writes a mark
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); expected {what}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}: expected {what}, found a JSON {type(value).__name__}")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one in each line; what a killed process left incomplete is skipped. Raises OSError."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


class LineFile:
    """A file of JSON lines that grows, for one process at a time: `lines` are those of before, without what a kill left
    of the last one, and those added. Raises UserError for a damaged file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "a+b") as file:
            file.seek(0)
            *whole, torn = file.read().split(b"\n")
            file.truncate(file.tell() - len(torn))
        try:
            self.lines: list[dict[str, Any]] = [json.loads(line) for line in whole]
        except ValueError:
            raise UserError(f"{path}: damaged; start again in another folder") from None

    def add(self, *lines: Mapping[str, Any]) -> None:
        """They are on disk when this returns. Raises UserError."""
        with write_errors(self.path), open(self.path, "ab") as file:
            file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.lines.extend(map(dict, lines))


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """An OSError in the block, of a command that continues, as a UserError about the file that it writes."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); what is finished is whole: free some space and "
            "run the same command"
        ) from error


def sync_folder(folder: Path) -> None:
    """A rename is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
