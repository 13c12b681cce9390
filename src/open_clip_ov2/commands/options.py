"""What the commands' parsers share."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from open_clip_ov2.argv import flag_type
from open_clip_ov2.data.sidecars import caption_sets
from open_clip_ov2.errors import UserError
from open_clip_ov2.training import default_device


def add_device(parser: argparse.ArgumentParser) -> None:
    kind, default = flag_type(lambda name: str(default_device(name))), str(default_device())
    parser.add_argument("--device", type=kind, default=default, help="default: cuda if there is a GPU, otherwise cpu")


def add_captions(parser: argparse.ArgumentParser, what: str) -> None:
    kind = flag_type(caption_sets)
    parser.add_argument("--captions", action="append", type=kind, metavar="NAME=FOLDER", help=f"{what}; repeatable")


@contextlib.contextmanager
def paths_checked() -> Iterator[None]:
    """What the system says of a path that the user gave (no such folder, not to be written) as a one-line error."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"{error.filename}: {error.strerror or error}") from error
