"""Where raw samples come from: webdataset tars (shards.py), or rows of a csv, a folder of classes, or made-up data.

The order is a function of seed, epoch, pass and consumer alone; a consumer is one data worker of one process.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from open_clip_ov2.data.order.assignment import Assignment, Cursor, assigned_rows
from open_clip_ov2.data.samples import IMAGE_ENTRY, IMAGE_SUFFIXES, SUFFIXES, ImageFile
from open_clip_ov2.data.skips import BAD_ROW, SkipCounter, SkipSample
from open_clip_ov2.errors import UserError, unknown_key

SHARES = "data workers over all processes (with --elastic: streams)"


class Source:
    """Gives raw samples: `__key__`, `__url__`, and bytes or text by suffix or column.

    What is implemented here is for data whose rows can be read by their number; shards.py has tars.
    `name` stands in errors. `resampled`: a pass is drawn with replacement, so that it need not show everything.
    """

    name: str
    resampled = False
    shuffled = True

    def count(self) -> int | None:
        """Number of samples, if it is written down anywhere. Raises UserError if that cannot be read."""
        raise NotImplementedError

    def sample(self, index: int) -> dict[str, Any]:
        """Raises SkipSample for a row that cannot be read."""
        raise NotImplementedError

    def place(self, index: int) -> str:
        """The name of the shard or row that `Cursor.on_open` gets by number."""
        return f"row {index + 1} of {self.name}"

    def fingerprint(self) -> dict[str, str | int]:
        """What the order of samples depends on, small; equal for equal data."""
        raise NotImplementedError

    def _usable(self, index: int, skips: SkipCounter | None) -> Iterator[dict[str, Any]]:
        """The sample of a row, or nothing if it is skipped and counted."""
        try:
            yield self.sample(index)
        except SkipSample as error:
            if skips is not None:
                skips.add(error.cause, error.detail, f"row {index + 1}", self.name)

    def check_consumers(self, consumers: int) -> None:
        """Raises UserError if so many consumers cannot share this source."""
        if (rows := self.count() or 0) < consumers:
            raise UserError(f"{self.name}: {rows} samples for {consumers} {SHARES}; use fewer")

    def train_samples(
        self, assignment: Assignment, skips: SkipCounter, cursor: Cursor | None = None
    ) -> Iterator[dict[str, Any]]:
        """One pass over a consumer's part, shuffled, from `cursor` on; no sample twice."""
        cursor, order = cursor or Cursor(), list(range(self.count() or 0))
        if self.shuffled:
            assignment.rng("rows").shuffle(order)
        for row in itertools.islice(assigned_rows(order, assignment), cursor.taken, None):
            cursor.on_open(row)
            cursor.taken += 1
            yield from self._usable(row, skips)

    def in_order(self, skips: SkipCounter | None = None) -> Iterator[dict[str, Any]]:
        """Everything, in file order."""
        for row in range(self.count() or 0):
            yield from self._usable(row, skips)


class CsvSource(Source):
    """Rows with an image path and captions. A path is tried as given, then from the csv's folder.

    The table is held in memory; images are read when they are used. A row that cannot be read is a skipped sample, by
    its line. Raises UserError: no such file or column, a separator that is not one character, no rows.
    """

    def __init__(self, path: Path, *, separator: str, image_column: str, caption_columns: tuple[str, ...]) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file (--train-data, --val-data)")
        if len(separator) != 1:
            raise UserError(f"--csv-separator {separator!r}: expected one character (a tab: --csv-separator $'\\t')")
        self.path, self.name = path, str(path)
        self._columns = tuple(dict.fromkeys(caption_columns))
        found = csv_rows(csv_lines(path), separator, image_column)
        header = next(found, CsvRow(1, (), "the file is empty"))
        if header.problem:
            raise UserError(f"{path}: line 1, the header: {header.problem} (--csv-separator {separator!r})")
        places = self._places(header.fields, separator, image_column)
        self._rows = [
            row if row.problem else row._replace(fields=tuple(row.fields[place] for place in places)) for row in found
        ]
        if not self._rows:
            raise UserError(f"{path}: no rows below the header")
        self._digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def _places(self, columns: tuple[str | None, ...], separator: str, image_column: str) -> list[int]:
        """Where the image's and the captions' columns are."""
        named = [str(column) for column in columns]
        for flag, names in (("--csv-img-key", (image_column,)), ("--caption-keys", self._columns)):
            for name in names:
                if name not in named:
                    raise unknown_key(f"{self.path}, {flag}, --csv-separator {separator!r}", name, named, "column")
        return [named.index(name) for name in (image_column, *self._columns)]

    def count(self) -> int | None:
        return len(self._rows)

    def fingerprint(self) -> dict[str, str | int]:
        return {"rows": len(self._rows), "content": self._digest}

    def sample(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        if row.problem:
            raise SkipSample(BAD_ROW, f"line {row.line}: {row.problem}")
        image, *captions = row.fields
        raw: dict[str, Any] = {"__key__": f"row {index + 1}", "__url__": str(self.path)}
        for name, caption in zip(self._columns, captions, strict=True):
            if caption is not None:
                raw[name] = caption.encode("utf-8", "surrogateescape")
        if image:
            raw[IMAGE_ENTRY] = ImageFile((image, str(self.path.parent / image)))
        return raw


class CsvRow(NamedTuple):
    """`line` counts from 1; with a `problem`, which says why the row cannot be used, there are no `fields`."""

    line: int
    fields: tuple[str | None, ...]
    problem: str = ""


def csv_lines(path: Path) -> list[str]:
    """Lines with their ends. Bytes that are not UTF-8 come through as surrogates, so that they cost their row alone.

    Raises UserError for a file in UTF-16.
    """
    with open(path, "rb") as file:
        if file.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE):
            raise UserError(f"{path}: text in UTF-16 (Excel's 'Unicode Text'); save it in UTF-8 (Excel's 'CSV UTF-8')")
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:  # -sig: Excel writes a mark
        return file.readlines()


def csv_rows(lines: Sequence[str], separator: str, image_column: str) -> Iterator[CsvRow]:
    """The header first, then every row: one bad row never takes others with it.

    A quote that is never closed would swallow the rows below it into one caption, which the endings of image files in
    them show. Such a row is reported by itself, and reading starts again at the next line; a caption in quotes may have
    line breaks.
    """
    start, columns, image = 0, 0, 0
    while start < len(lines):
        reader = csv.reader((lines[i] for i in range(start, len(lines))), delimiter=separator)
        problem, fields = "", list[str]()
        try:
            fields = next(reader)
        except csv.Error as error:
            problem = str(error)
        begin, start = start, start + reader.line_num
        part = lines[begin:start]
        if not problem and _swallows(part, separator, image, columns, at_end=start == len(lines)):
            problem = "a quote is opened and not closed"
        if problem:
            yield CsvRow(begin + 1, (), problem)
            start = begin + 1
        elif fields:
            if not columns:
                columns, image = len(fields), fields.index(image_column) if image_column in fields else 0
            if len(fields) > columns:
                yield CsvRow(begin + 1, (), f"{len(fields)} fields, and the header has {columns}")
            else:
                yield CsvRow(begin + 1, (*fields, *[None] * (columns - len(fields))))


def _swallows(part: Sequence[str], separator: str, image: int, columns: int, *, at_end: bool) -> bool:
    """Whether the lines of one record are several rows that a lone quote has joined."""
    if len(part) == 1:
        odd = part[0].count('"') % 2 == 1
        return at_end and odd and any(cell.startswith('"') for cell in part[0].split(separator))
    if "".join(part).count('"') % 2:
        return True
    for line in part[1:]:
        cells = line.rstrip("\r\n").split(separator)
        if len(cells) >= columns and cells[image].strip('"').lower().endswith(SUFFIXES):
            return True
    return False


class ImageFolderSource(Source):
    """Images by class, `folder/CLASS/any/depth/image.jpg`: the layout of torchvision's ImageFolder.

    A sample's key is its path below `folder`, its entry `cls` the name of the class. In the order of the keys; hidden
    files and other endings are left out. Raises UserError: no such folder, no class with an image.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; expected a folder with one folder for each class")
        self.folder, self.name = folder, str(folder)
        self.names = sorted(name for name in image_names(folder) if "/" in name)  # one beside the folders has no class
        if not self.names:
            endings = ", ".join(IMAGE_SUFFIXES)
            raise UserError(f"{folder}: no image ({endings}) in its subfolders; expected one folder for each class")

    def count(self) -> int | None:
        return len(self.names)

    def fingerprint(self) -> dict[str, str | int]:
        digest = hashlib.sha256(os.fsencode("\0".join(self.names)))
        return {"pictures": len(self.names), "names": digest.hexdigest()}

    def place(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def sample(self, index: int) -> dict[str, Any]:
        name = self.names[index]
        image = ImageFile((str(self.folder / name),))
        return {"__key__": name, "__url__": str(self.folder), "cls": name.split("/")[0], IMAGE_ENTRY: image}


def image_names(folder: Path) -> Iterator[str]:
    """Paths of images below a folder, as /-separated text; hidden files and folders left out, links followed."""
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(root).relative_to(folder)
        shown = (name for name in files if not name.startswith("."))
        yield from ((below / name).as_posix() for name in shown if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES)


@dataclass(frozen=True)
class SyntheticSource(Source):
    """Black images, `image_size` = (width, height) in px, with one caption: to measure everything but the data."""

    num_samples: int
    image_size: tuple[int, int]
    name = "--dataset-type synthetic (--train-num-samples)"
    shuffled = False

    def count(self) -> int | None:
        return self.num_samples

    def fingerprint(self) -> dict[str, str | int]:
        return {"synthetic samples": self.num_samples}

    def sample(self, index: int) -> dict[str, Any]:
        image = Image.new("RGB", self.image_size)
        return {"__key__": f"synthetic {index}", "__url__": "synthetic", IMAGE_ENTRY: image, "txt": "Dummy caption"}
