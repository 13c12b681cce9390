"""Which tars a caption set belongs to: FOLDER/shards.txt has, line by line, what a command line named them by.

It is no setting: a set may grow by further tars.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from open_clip_ov2.data.shards import expand_shards
from open_clip_ov2.data.sidecars import SUFFIX, read_sidecar, shard_name
from open_clip_ov2.data.tars import read_tar
from open_clip_ov2.errors import UserError

SHARDS = "shards.txt"


def note_shards(folder: Path, shards: str) -> None:
    """Add tars to those of a set, as they are written for --train-data; local paths become absolute."""
    parts = [part if ":" in part else os.path.abspath(part) for part in shards.split("::")]
    text = "::".join(parts)
    if text not in noted_shards(folder):
        with open(folder / SHARDS, "a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{text}\n")


def noted_shards(folder: Path) -> list[str]:
    """The tars of a set, as for --train-data."""
    path = folder / SHARDS
    return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if path.is_file() else []


def tars_of(folder: Path, given: str | None) -> dict[str, str]:
    """Address of its tar by the name of each sidecar: of the tars that are `given`, or else noted. Raises UserError."""
    texts = noted_shards(folder) if given is None else [given]
    if not texts:
        raise UserError(f"{folder}: does not say which tars it belongs to; name them with --shards")
    return {f"{shard_name(url)}{SUFFIX}": url for text in texts for url in expand_shards(text)[0]}


def with_samples(
    sidecar: Path, url: str, on_broken: Callable[[str], None]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The lines of a sidecar with the samples of its tar. Raises UserError where they do not belong together."""
    samples = read_tar(url, on_broken)  # not read beyond the last line, so that what a broken tar lacks does not count
    for number, line in enumerate(read_sidecar(sidecar), 1):
        sample = next(samples, None)
        if sample is None or line["key"] != sample["__key__"]:
            raise UserError(f"{url}: its sample {number} is not that of line {number} of {sidecar}; is it another tar?")
        yield line, sample
