"""Raw samples of webdataset tars, in a deterministic order.

Opening (also `pipe:` and `https:`), tar reading and grouping are webdataset's; the order of shards, what a break
means, and what is checked beforehand are ours.
"""

from __future__ import annotations

import ast
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from braceexpand import braceexpand
from webdataset.filters import shuffle as buffer_shuffle
from webdataset.gopen import gopen_schemes, rewrite_url
from webdataset.tariterators import group_by_keys, tar_file_expander, url_opener

from open_clip_ov2.data.share import Share
from open_clip_ov2.data.skips import BROKEN_SHARD, SkipCounter
from open_clip_ov2.errors import UserError

SHUFFLE_INITIAL = 1000  # samples in the buffer before the first comes out, as in OpenCLIP
TAR_BLOCK = 512  # bytes; a tar ends with two blocks of zeros (POSIX pax), of which Python reads at least one
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # gzip, bzip2, xz: their own checksums notice a break


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
            raise UserError(f"shards {part!r}: {error}; braces look like {{00000..00099}}") from None
        urls += expanded
        each += [weights[index] if weights else 1.0] * len(expanded)
    check_shards_exist(urls)
    return tuple(urls), tuple(each) if weights else None


def _parse_weights(text: str, parts: int) -> list[float]:
    flag = f"--train-data-upsampling-factors {text}"
    try:
        weights = [float(weight) for weight in text.split("::")]
    except ValueError:
        raise UserError(f"{flag}: numbers joined by :: are wanted, for example 1::2") from None
    if len(weights) != parts:
        raise UserError(f"{flag}: {len(weights)} numbers for {parts} data sources; one for each, joined by ::")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise UserError(f"{flag}: finite numbers are wanted, none below 0 and one above, for example 1::2")
    return weights


def check_shards_exist(urls: Sequence[str]) -> None:
    """Raises UserError: none named, a local one that is missing or a folder, a scheme that webdataset cannot open."""
    if not urls or not all(urls):
        raise UserError("the list of shards is empty or has an empty name in it; name tars, as in 'data/{00..99}.tar'")
    missing: list[str] = []
    for url in urls:
        parsed = urlparse(rewrite_url(url))
        if parsed.scheme not in ("", "file"):
            if parsed.scheme not in gopen_schemes:
                raise UserError(
                    f"{url}: webdataset cannot open {parsed.scheme}:; use 'pipe:COMMAND' that prints the tar"
                )
            continue
        path = parsed.path if parsed.scheme else url
        if os.path.isdir(path):
            raise UserError(f"{url} is a folder; name the tars in it, for example '{url}/{{00000..00099}}.tar'")
        if not os.path.exists(path):
            missing.append(url)
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{len(missing)} of {len(urls)} shards do not exist: {shown}; check the path and the braces")


@dataclass(frozen=True)
class WebDatasetSource:
    """Tars read as streams. `resampled`: shards drawn with replacement, by weight."""

    urls: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    resampled: bool = False

    def count(self) -> int | None:
        """From sizes.json or __len__ in each folder of the shards, where OpenCLIP looks in the first one's."""
        folders: dict[Path, list[str]] = {}
        for url in self.urls:
            folders.setdefault(Path(url).parent, []).append(Path(url).name)
        counts = [_folder_count(folder, names) for folder, names in folders.items()]
        return None if None in counts else sum(filter(None, counts))

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
        return _read_tars(self.urls, skips or SkipCounter())


def _folder_count(folder: Path, names: list[str]) -> int | None:
    sizes, length = folder / "sizes.json", folder / "__len__"
    try:
        if sizes.is_file():
            known = json.loads(sizes.read_text())
            return sum(int(known[name]) for name in names) if all(name in known for name in names) else None
        return int(ast.literal_eval(length.read_text())) if length.is_file() else None
    except (ValueError, TypeError, SyntaxError) as error:
        file = sizes if sizes.is_file() else length
        raise UserError(f"{file}: not a number of samples ({error}); mend it or say --train-num-samples") from None


class _Watched:
    """A stream that remembers how it began and ended.

    tarfile takes a damaged header for the end of the archive, without a word. A tar that was read to its end had
    zeros last.
    """

    def __init__(self, stream: Any, url: str) -> None:
        self._stream, self._url = stream, url
        self._head = self._tail = b""

    def __str__(self) -> str:  # webdataset puts it into its error messages
        return self._url

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        if len(self._head) < 8:
            self._head += data[: 8 - len(self._head)]
        self._tail = (self._tail + data)[-TAR_BLOCK:]
        return data

    def ended_early(self) -> bool:
        return not self._head.startswith(COMPRESSED) and any(self._tail)


def _read_tars(urls: Sequence[str], skips: SkipCounter) -> Iterator[dict[str, Any]]:
    """Samples of tars. One that breaks off, or has a name twice, is counted once, what could be read is used."""
    for url in urls:
        broken: list[str] = []

        def note(error: Exception, broken: list[str] = broken) -> bool:
            if not broken:
                broken.append(f"{type(error).__name__}: {error.args[0] if error.args else error}")
            return True

        watched = None
        for opened in url_opener([{"url": url}], handler=note):
            watched = _Watched(opened["stream"], url)
            files = tar_file_expander([{"url": url, "stream": watched}], handler=note)
            yield from group_by_keys(files, handler=note)
        if not broken and watched is not None and watched.ended_early():
            broken.append("a damaged header, or no end of archive: what follows is not read")
        if broken:
            skips.add(BROKEN_SHARD, broken[0], "", url)
