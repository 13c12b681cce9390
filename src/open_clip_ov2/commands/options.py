"""What the commands' parsers share."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from open_clip_ov2.compare.bench.settings import default_device
from open_clip_ov2.errors import UserError


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=default_device(), help="default: cuda if there is a GPU, otherwise cpu")


@contextlib.contextmanager
def values_checked() -> Iterator[None]:
    """The model's own ValueErrors (a flag out of range) as one-line errors."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def paths_checked() -> Iterator[None]:
    """What the system says of a path that the user gave (no such folder, not to be written) as a one-line error."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"{error.filename}: {error.strerror or error}") from error


def existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    return path
