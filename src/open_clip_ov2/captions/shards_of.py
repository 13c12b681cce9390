"""Which tars a caption set belongs to: FOLDER/shards.txt has, line by line, what a command line named them by.

It is no setting: a set may grow by further tars.
"""

from __future__ import annotations

import os
from pathlib import Path

from open_clip_ov2.data.shards import expand_shards
from open_clip_ov2.errors import UserError

SHARDS = "shards.txt"


def note_shards(folder: Path, shards: str) -> None:
    """Add tars to those of a set, as they are written for --train-data; local paths become absolute."""
    parts = [part if ":" in part else os.path.abspath(part) for part in shards.split("::")]
    path, text = folder / SHARDS, "::".join(parts)
    if text not in (path.read_text(encoding="utf-8").splitlines() if path.is_file() else []):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{text}\n")


def copy_note(source: Path, folder: Path, given: str | None) -> None:
    """Note for a set that was made of another one what that one notes, or what is `given`."""
    noted = source / SHARDS
    texts = [given] if given is not None else noted.read_text(encoding="utf-8").splitlines() if noted.is_file() else []
    for text in texts:
        note_shards(folder, text)


def shards_of(folder: Path, given: str | None = None) -> tuple[str, ...]:
    """Addresses of the tars of a set: what is `given`, or else noted. Raises UserError."""
    path = folder / SHARDS
    if given is None and not path.is_file():
        raise UserError(f"{folder}: does not say which tars it belongs to; name them with --shards")
    texts = [given] if given is not None else path.read_text(encoding="utf-8").split("\n")
    found = [url for text in texts if text for url in expand_shards(text)[0]]
    return tuple(dict.fromkeys(found))
