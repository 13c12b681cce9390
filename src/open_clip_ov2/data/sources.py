"""Raw samples in a deterministic order: webdataset tars, a csv, or made up.

A raw sample is a dict with `__key__`, `__url__` and bytes (or text) for each suffix or column. The order is a
function of seed, epoch, pass and consumer alone; a consumer is one data worker of one process.
"""

from __future__ import annotations

import ast
import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from braceexpand import braceexpand
from PIL import Image
from webdataset.filters import shuffle as buffer_shuffle
from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

from open_clip_ov2.data.skips import BROKEN_SHARD, SkipCounter
from open_clip_ov2.errors import UserError

SHUFFLE_INITIAL = 1000  # samples in the buffer before the first comes out, as in OpenCLIP


@dataclass(frozen=True)
class Share:
    """Which part of the data one consumer reads, and in which order."""

    seed: int
    epoch: int
    pass_index: int
    consumer: int
    consumers: int
    shuffle_buffer: int

    def rng(self, *more: object) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, self.epoch, self.pass_index, *more))))


class Source(Protocol):
    """Where samples come from."""

    def count(self) -> int | None:
        """Number of samples, if it is written down anywhere."""

    def check_consumers(self, consumers: int) -> None:
        """Raises UserError if so many cannot share this source."""

    def train_samples(self, share: Share, skips: SkipCounter) -> Iterator[dict[str, Any]]:
        """One pass over a consumer's part, shuffled."""

    def in_order(self, skips: SkipCounter | None = None) -> Iterator[dict[str, Any]]:
        """Everything, in file order."""


# --- webdataset ------------------------------------------------------------------------------------------


def expand_shards(text: str, weights_text: str | None = None) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Braces and `::` expanded; one weight a shard if weights (`1::2`) are given. Local files must exist.

    Raises UserError.
    """
    parts = text.split("::")
    weights: list[float] | None = None
    if weights_text is not None:
        try:
            weights = [float(weight) for weight in weights_text.split("::")]
        except ValueError:
            raise UserError(
                f"--train-data-upsampling-factors {weights_text}: numbers joined by :: are wanted"
            ) from None
        if len(weights) != len(parts):
            raise UserError(f"--train-data-upsampling-factors has {len(weights)} numbers for {len(parts)} data sources")
    urls: list[str] = []
    each: list[float] = []
    for index, part in enumerate(parts):
        expanded = [part] if part.startswith("pipe:") and "{" not in part else list(braceexpand(part))
        urls += expanded
        each += [weights[index] if weights else 1.0] * len(expanded)
    _check_local(urls)
    return tuple(urls), tuple(each) if weights else None


def _check_local(urls: list[str]) -> None:
    local = [Path(url) for url in urls if url and "://" not in url and not url.startswith("pipe:")]
    if not all(urls):
        raise UserError("the list of shards has an empty name in it")
    missing = [str(path) for path in local if not path.exists()]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{len(missing)} of {len(urls)} shards do not exist: {shown}")
    folders = [str(path) for path in local if path.is_dir()]
    if folders:
        raise UserError(
            f"{folders[0]} is a folder; name the tars in it, for example '{folders[0]}/{{00000..00099}}.tar'"
        )


@dataclass(frozen=True)
class WebDatasetSource:
    """Tars read as streams. `resampled`: shards drawn with replacement, by weight."""

    urls: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    resampled: bool = False

    def count(self) -> int | None:
        """From sizes.json or __len__ beside the shards, as OpenCLIP looks for it."""
        folder = Path(self.urls[0]).parent
        sizes, length = folder / "sizes.json", folder / "__len__"
        if sizes.is_file():
            known = json.loads(sizes.read_text())
            names = [Path(url).name for url in self.urls]
            return sum(int(known[name]) for name in names) if all(name in known for name in names) else None
        return int(ast.literal_eval(length.read_text())) if length.is_file() else None

    def check_consumers(self, consumers: int) -> None:
        if not self.resampled and len(self.urls) < consumers:
            raise UserError(
                f"{len(self.urls)} training shards for {consumers} data workers over all processes: use fewer "
                "--workers, more shards, or --dataset-resampled"
            )

    def train_samples(self, share: Share, skips: SkipCounter) -> Iterator[dict[str, Any]]:
        samples = _read_tars(self._shards(share), skips)
        rng = share.rng("samples", share.consumer)
        initial = min(SHUFFLE_INITIAL, share.shuffle_buffer)
        return iter(buffer_shuffle(share.shuffle_buffer, initial=initial, rng=rng)(samples))

    def _shards(self, share: Share) -> list[str]:
        if self.resampled:
            rng = share.rng("resampled", share.consumer)
            return rng.choices(self.urls, weights=self.weights, k=max(1, len(self.urls) // share.consumers))
        shards = list(self.urls)
        share.rng("shards").shuffle(shards)
        return shards[share.consumer :: share.consumers]

    def in_order(self, skips: SkipCounter | None = None) -> Iterator[dict[str, Any]]:
        return _read_tars(list(self.urls), skips or SkipCounter())


def _read_tars(urls: list[str], skips: SkipCounter) -> Iterator[dict[str, Any]]:
    """Samples of tars; a tar that breaks off gives what came before, and is counted once."""
    for url in urls:
        broken: list[str] = []

        def note(error: Exception, broken: list[str] = broken) -> bool:
            broken.append(f"{type(error).__name__}: {error.args[0] if error.args else error}")
            return True

        files = tar_file_expander(url_opener([{"url": url}], handler=note), handler=note)
        yield from group_by_keys(files, handler=note)
        if broken:
            skips.add(BROKEN_SHARD, broken[0], "", url)


# --- csv -------------------------------------------------------------------------------------------------


class CsvSource:
    """Rows with an image path and captions. Paths are taken as given, or else relative to the csv's folder."""

    def __init__(self, path: Path, *, separator: str, image_column: str, caption_columns: tuple[str, ...]) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, delimiter=separator)
            columns = list(reader.fieldnames or [])
            for name in (image_column, *caption_columns):
                if name not in columns:
                    raise UserError(
                        f"{path}: no column {name!r} (there are: {', '.join(columns)}; --csv-separator, --csv-img-key, "
                        "--caption-keys)"
                    )
            self.rows = [{name: row[name] or "" for name in (image_column, *caption_columns)} for row in reader]
        if not self.rows:
            raise UserError(f"{path}: no rows")
        self.path = path
        self.image_column = image_column

    def count(self) -> int | None:
        return len(self.rows)

    def check_consumers(self, consumers: int) -> None:
        if len(self.rows) < consumers:
            raise UserError(f"{self.path}: {len(self.rows)} rows for {consumers} data workers; use fewer --workers")

    def train_samples(self, share: Share, skips: SkipCounter) -> Iterator[dict[str, Any]]:
        order = list(range(len(self.rows)))
        share.rng("rows").shuffle(order)
        return (self._read(index) for index in order[share.consumer :: share.consumers])

    def in_order(self, skips: SkipCounter | None = None) -> Iterator[dict[str, Any]]:
        return (self._read(index) for index in range(len(self.rows)))

    def _read(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        raw: dict[str, Any] = {"__key__": f"row {index + 1}", "__url__": str(self.path), **row}
        image = Path(row[self.image_column])
        for file in (image, self.path.parent / image):
            if file.is_file():
                raw["jpg"] = file.read_bytes()  # PIL looks at the content, not at the suffix
                break
        return raw


# --- synthetic -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SyntheticSource:
    """Black pictures with one caption, for measuring everything but the data."""

    num_samples: int
    image_size: tuple[int, int]
    caption: str = "Dummy caption"

    def count(self) -> int | None:
        return self.num_samples

    def check_consumers(self, consumers: int) -> None:
        if self.num_samples < consumers:
            raise UserError(f"--train-num-samples {self.num_samples} for {consumers} data workers; use fewer --workers")

    def train_samples(self, share: Share, skips: SkipCounter) -> Iterator[dict[str, Any]]:
        return (self._make(index) for index in range(share.consumer, self.num_samples, share.consumers))

    def in_order(self, skips: SkipCounter | None = None) -> Iterator[dict[str, Any]]:
        return (self._make(index) for index in range(self.num_samples))

    def _make(self, index: int) -> dict[str, Any]:
        image = Image.new("RGB", self.image_size)
        return {"__key__": f"synthetic {index}", "__url__": "synthetic", "png": image, "txt": self.caption}
