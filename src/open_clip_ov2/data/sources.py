"""Raw samples in a deterministic order: webdataset tars (shards.py), a csv, a folder of classes, or made up.

The order is a function of seed, epoch, pass and consumer alone; a consumer is one data worker of one process.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from open_clip_ov2.data.order.assignment import rows_of
from open_clip_ov2.data.order.position import Cursor
from open_clip_ov2.data.order.share import Share, Source
from open_clip_ov2.data.samples import IMAGE_ENTRY, IMAGE_SUFFIXES, ImageFile
from open_clip_ov2.data.shards import WebDatasetSource, check_shards_exist, expand_shards
from open_clip_ov2.data.skips import SkipCounter
from open_clip_ov2.errors import UserError

__all__ = [
    "CsvSource",
    "ImageFolderSource",
    "Share",
    "Source",
    "SyntheticSource",
    "WebDatasetSource",
    "check_shards_exist",
    "expand_shards",
]


def _go_on(rows: Iterator[int], make: Callable[[int], dict[str, Any]], cursor: Cursor) -> Iterator[dict[str, Any]]:
    for row in itertools.islice(rows, cursor.taken, None):
        cursor.opens(row)
        cursor.taken += 1
        yield make(row)


class CsvSource:
    """Rows with an image path and captions. A path is tried as given, then from the csv's folder.

    The table is held in memory; pictures are read when they are used. Raises UserError: no such file or column, a
    separator that is not one character, a table that csv cannot parse.
    """

    resampled = False

    def __init__(self, path: Path, *, separator: str, image_column: str, caption_columns: tuple[str, ...]) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file (--train-data, --val-data)")
        if len(separator) != 1:
            raise UserError(f"--csv-separator {separator!r}: one character is wanted (a tab: --csv-separator $'\\t')")
        self.path = path
        self._columns = tuple(dict.fromkeys(caption_columns))
        try:
            self._rows = list(self._read_rows(separator, image_column))
        except csv.Error as error:
            raise UserError(f"{path}: not a table: {error} (--csv-separator {separator!r})") from None
        if not self._rows:
            raise UserError(f"{path}: no rows below the header")
        self._digest = _digest(path)

    def _read_rows(self, separator: str, image_column: str) -> Iterator[tuple[str | None, ...]]:
        """(image path, captions ...) of each row; None where a row is too short."""
        # Bad UTF-8 costs its row, not the run: the bytes come back in _caption. utf-8-sig: Excel writes a mark.
        with open(self.path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file, delimiter=separator)
            there = list(reader.fieldnames or [])
            for flag, names in (("--csv-img-key", (image_column,)), ("--caption-keys", self._columns)):
                for name in names:
                    if name not in there:
                        columns = ", ".join(there)
                        raise UserError(
                            f"{self.path}: no column {name!r} ({flag}) with --csv-separator {separator!r}; there are: "
                            f"{columns}"
                        )
            for row in reader:
                yield (row[image_column], *(row[name] for name in self._columns))

    def count(self) -> int | None:
        return len(self._rows)

    def check_consumers(self, consumers: int) -> None:
        if len(self._rows) < consumers:
            raise UserError(f"{self.path}: {len(self._rows)} rows for {consumers} data workers; use fewer --workers")

    def fingerprint(self) -> dict[str, str | int]:
        return {"rows": len(self._rows), "content": self._digest}

    def place(self, index: int) -> str:
        return f"row {index + 1} of {self.path}"

    def train_samples(self, share: Share, skips: SkipCounter, cursor: Cursor | None = None) -> Iterator[dict[str, Any]]:
        order = list(range(len(self._rows)))
        share.rng("rows").shuffle(order)
        return _go_on(rows_of(order, share), self._sample, cursor or Cursor())

    def in_order(self, skips: SkipCounter | None = None) -> Iterator[dict[str, Any]]:
        return (self._sample(index) for index in range(len(self._rows)))

    def _sample(self, index: int) -> dict[str, Any]:
        image, *captions = self._rows[index]
        raw: dict[str, Any] = {"__key__": f"row {index + 1}", "__url__": str(self.path)}
        for name, caption in zip(self._columns, captions, strict=True):
            if caption is not None:
                raw[name] = caption.encode("utf-8", "surrogateescape")
        if image:
            raw[IMAGE_ENTRY] = ImageFile((image, str(self.path.parent / image)))
        return raw


class ImageFolderSource:
    """Pictures by class, `folder/CLASS/any/depth/picture.jpg`: the layout of torchvision's ImageFolder.

    A sample's key is its path below `folder`, its entry `cls` the name of the class. In the order of the keys; hidden
    files and other endings are left out. Raises UserError: no such folder, no class with a picture.
    """

    resampled = False

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; one folder for each class is wanted in it")
        self.folder = folder
        self.names = sorted(_picture_names(folder))
        if not self.names:
            endings = ", ".join(IMAGE_SUFFIXES)
            raise UserError(f"{folder}: no picture ({endings}) in a folder of it; one folder for each class is wanted")

    def count(self) -> int | None:
        return len(self.names)

    def check_consumers(self, consumers: int) -> None:
        if len(self.names) < consumers:
            raise UserError(
                f"{self.folder}: {len(self.names)} pictures for {consumers} data workers; use fewer --workers"
            )

    def fingerprint(self) -> dict[str, str | int]:
        digest = hashlib.sha256(os.fsencode("\0".join(self.names)))
        return {"pictures": len(self.names), "names": digest.hexdigest()}

    def place(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def train_samples(self, share: Share, skips: SkipCounter, cursor: Cursor | None = None) -> Iterator[dict[str, Any]]:
        order = list(range(len(self.names)))
        share.rng("rows").shuffle(order)
        return _go_on(rows_of(order, share), self._sample, cursor or Cursor())

    def in_order(self, skips: SkipCounter | None = None) -> Iterator[dict[str, Any]]:
        return (self._sample(index) for index in range(len(self.names)))

    def _sample(self, index: int) -> dict[str, Any]:
        name = self.names[index]
        picture = ImageFile((str(self.folder / name),))
        return {"__key__": name, "__url__": str(self.folder), "cls": name.split("/")[0], IMAGE_ENTRY: picture}


def _picture_names(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(root).relative_to(folder)
        if below.parts:  # a picture beside the folders has no class
            wanted = (name for name in files if not name.startswith("."))
            yield from ((below / name).as_posix() for name in wanted if _ending(name) in IMAGE_SUFFIXES)


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(partial(file.read, 1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class SyntheticSource:
    """Black pictures, `image_size` = (width, height) in px, with one caption: to measure everything but the data."""

    num_samples: int
    image_size: tuple[int, int]
    caption: str = "Dummy caption"
    resampled: bool = False

    def count(self) -> int | None:
        return self.num_samples

    def check_consumers(self, consumers: int) -> None:
        if self.num_samples < consumers:
            raise UserError(f"--train-num-samples {self.num_samples} for {consumers} data workers; use fewer --workers")

    def fingerprint(self) -> dict[str, str | int]:
        return {"synthetic samples": self.num_samples}

    def place(self, index: int) -> str:
        return f"synthetic sample {index}"

    def train_samples(self, share: Share, skips: SkipCounter, cursor: Cursor | None = None) -> Iterator[dict[str, Any]]:
        return _go_on(rows_of(range(self.num_samples), share), self._make, cursor or Cursor())

    def in_order(self, skips: SkipCounter | None = None) -> Iterator[dict[str, Any]]:
        return (self._make(index) for index in range(self.num_samples))

    def _make(self, index: int) -> dict[str, Any]:
        image = Image.new("RGB", self.image_size)
        return {"__key__": f"synthetic {index}", "__url__": "synthetic", IMAGE_ENTRY: image, "txt": self.caption}
