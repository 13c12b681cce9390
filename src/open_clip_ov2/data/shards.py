"""Raw samples of webdataset tars in a deterministic order, and the list of shards, checked beforehand."""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from open_clip_ov2.data.order.assignment import Assignment, Cursor, ShardRange, ShuffledPass, assigned_shards
from open_clip_ov2.data.sidecars import CaptionSet
from open_clip_ov2.data.skips import SkipCounter
from open_clip_ov2.data.sources import SHARES, Source
from open_clip_ov2.data.storage import check_readable, local_path
from open_clip_ov2.data.tars import read_tar
from open_clip_ov2.errors import UserError


def expand_shards(text: str, weights_text: str | None = None) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Braces and `::` expanded (in `pipe:` commands too); each part's weight (`1::2`) for each of its shards.

    Local shards must exist. Raises UserError.
    """
    parts = text.split("::")
    weights = _parse_weights(weights_text, len(parts)) if weights_text is not None else None
    urls: list[str] = []
    each: list[float] = []
    for index, part in enumerate(parts):
        try:  # braceexpand also eats backslashes, which a command without braces may need
            expanded = [part] if part.startswith("pipe:") and "{" not in part else list(braceexpand(part))
        except ValueError as error:
            raise UserError(f"shards {part!r}: {error}; write braces as in {{00000..00099}}") from None
        urls += expanded
        each += [weights[index] if weights else 1.0] * len(expanded)
    check_shards_exist(urls)
    return tuple(urls), tuple(each) if weights else None


def _parse_weights(text: str, parts: int) -> list[float]:
    try:
        weights = [float(weight) for weight in text.split("::")]
    except ValueError:
        weights = []
    if len(weights) != parts or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise UserError(
            f"--train-data-upsampling-factors {text}: expected a finite number >= 0 for each part of --train-data "
            f"({parts}), joined by ::, at least one of them > 0, for example 1::2"
        )
    return weights


def check_shards_exist(urls: Sequence[str]) -> None:
    """Raises UserError: none named, a local one that is missing or a folder, a csv, a scheme that
    webdataset cannot open."""
    if not urls or not all(urls):
        raise UserError("the list of shards is empty or has an empty name in it; name tars, as in 'data/{00..99}.tar'")
    for url in urls:
        if not url.startswith("pipe:") and url.lower().endswith((".csv", ".tsv")):
            raise UserError(
                f"{url}: a csv, where tars are expected; only `ov2 train` (--train-data, --val-data, with "
                "--dataset-type csv or auto) and `ov2 caption` read one, so make tars of it for the rest (docs/data.md)"
            )
    check_readable(urls, "shards", "name the tars in it, for example '{}/{{00000..00099}}.tar'")


@dataclass(frozen=True)
class WebDatasetSource(Source):
    """Tars read as streams. `resampled`: shards are drawn with replacement, by weight. `captions`: sets with a sidecar
    for each tar, which change neither order nor counts. Raises UserError if one is missing."""

    urls: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    resampled: bool = False
    captions: tuple[CaptionSet, ...] = ()

    def __post_init__(self) -> None:
        for one in self.captions:
            one.check(self.urls)

    def count(self) -> int | None:
        """From sizes.json or __len__ in each folder of the shards; OpenCLIP looks in the first one's alone."""
        folders: dict[Path, list[str]] = {}
        for path in (Path(local_path(url)) for url in self.urls):
            folders.setdefault(path.parent, []).append(path.name)
        counts = [_folder_count(folder, names) for folder, names in folders.items()]
        return None if None in counts else sum(filter(None, counts))

    def check_consumers(self, consumers: int) -> None:
        if not self.resampled and len(self.urls) < consumers:
            raise UserError(
                f"{len(self.urls)} training shards for {consumers} {SHARES}: use fewer, more shards, or "
                "--dataset-resampled"
            )

    def fingerprint(self) -> dict[str, str | int]:
        digest = hashlib.sha256("\0".join(self.urls).encode("utf-8", "surrogatepass"))
        digest.update(repr(self.weights).encode())
        return {"shards": len(self.urls), "resampled": int(self.resampled), "names": digest.hexdigest()}

    def place(self, index: int) -> str:
        return self.urls[index]

    def train_samples(
        self, assignment: Assignment, skips: SkipCounter, cursor: Cursor | None = None
    ) -> Iterator[dict[str, Any]]:
        order = list(range(len(self.urls)))
        if self.resampled:
            rng, count = assignment.rng("resampled", assignment.consumer), max(1, len(order) // assignment.consumers)
            ranges = [ShardRange(shard) for shard in rng.choices(order, weights=self.weights, k=count)]
        else:
            assignment.rng("shards").shuffle(order)
            ranges = assigned_shards(order, assignment)
        return iter(
            ShuffledPass(
                ranges,
                assignment,
                cursor or Cursor(),
                lambda shard, on_broken: read_tar(self.urls[shard], on_broken, self.captions),
                lambda shard, detail: skips.add_broken(self.urls[shard], detail),
            )
        )

    def in_order(self, skips: SkipCounter | None = None) -> Iterator[dict[str, Any]]:
        counter = skips or SkipCounter()
        for url in self.urls:
            yield from read_tar(url, partial(counter.add_broken, url), self.captions)


def _folder_count(folder: Path, names: list[str]) -> int | None:
    sizes, length = folder / "sizes.json", folder / "__len__"
    try:
        if sizes.is_file():
            known = json.loads(sizes.read_text())
            return sum(int(known[name]) for name in names) if all(name in known for name in names) else None
        return int(ast.literal_eval(length.read_text())) if length.is_file() else None
    except (ValueError, TypeError, SyntaxError) as error:
        file = sizes if sizes.is_file() else length
        raise UserError(f"{file}: not a number of samples ({error}); fix it or give --train-num-samples") from None
