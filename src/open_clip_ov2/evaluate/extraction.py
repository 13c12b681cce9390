"""Features of a whole set, computed once: what every probe starts from.

Shapes: M samples of the set, B batch, N image tokens, D width (evaluate/__init__.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from open_clip_ov2.data.eval_loader import EvalLoader
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.eval_model import Subject, all_gathered, gathered
from open_clip_ov2.evaluate.feature_memory import available_bytes, on_disk, own_pages
from open_clip_ov2.evaluate.skipped import all_keys

logger = logging.getLogger(__name__)

Kind = Literal["pooled", "tokens"]
VERSION = 2  # of the cache file


@dataclass(frozen=True)
class Features:
    """All usable samples in file order: `values` `(M, D)` for "pooled", `(M, N, D)` for "tokens", on the CPU.

    A label is the text under the loader's `group_by`, "" where a sample has none. `skips`: keys of samples that
    could not be used, by cause, over all processes.
    """

    kind: Kind
    keys: tuple[str, ...]
    labels: tuple[str, ...]
    values: Tensor
    skips: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Cache:
    """A folder for features. `identity` is what they depend on beside the loader's own fingerprint, JSON-ready: model,
    preprocessing, and `stamp` of the files of both checkpoint and data. Another identity is another file.
    """

    folder: Path
    identity: Mapping[str, Any]

    def file(self, kind: Kind, dtype: torch.dtype, data: Mapping[str, Any]) -> Path:
        text = json.dumps([VERSION, kind, str(dtype), data, self.identity], sort_keys=True)
        return self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"


def stamp(paths: Sequence[str | Path]) -> str:
    """Name, size and time of change of files in one hash; of what is no local file, the name alone."""
    digest = hashlib.sha256()
    for path in paths:
        found = os.stat(path) if os.path.exists(path) else None
        size_time = (found.st_size, found.st_mtime_ns) if found else ()
        digest.update(repr((str(path), *size_time)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@torch.no_grad()
def extract(
    subject: Subject,
    loader: EvalLoader,
    world_size: int = 1,
    kind: Kind = "pooled",
    *,
    dtype: torch.dtype = torch.float32,
    cache: Cache | None = None,
    disk: Path | None = None,
) -> Features:
    """Features of the loader's set; the same on any number of processes, each of which gets all of them.

    `dtype` is what is kept: half of the memory with float16. `disk`: a folder in which the features lie while they are
    used, for what main memory cannot hold; each process has a file of its own there. Raises UserError: a subject
    without "features", or more memory needed than there is.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind {kind!r}; it is one of {', '.join(get_args(Kind))}")
    if "features" not in subject.abilities:
        raise UserError(f"{subject.name} has no image features, so it cannot be probed")
    file = cache.file(kind, dtype, loader.fingerprint()) if cache else None
    if file and _on_all(file.is_file(), world_size):
        logger.info("%s: features read", file)
        return _read(file)
    parts = _Parts(kind, dtype, subject.device, world_size, loader.num_samples, disk)
    encode = subject.pooled if kind == "pooled" else subject.tokens
    for batch in loader:
        rows = list(zip(batch.keys, batch.groups, strict=True))
        parts.add(batch.indices, rows, encode(batch.images_BCHW.to(subject.device)))
    features = parts.assembled(loader.skipped_keys)
    if file and (world_size == 1 or torch.distributed.get_rank() == 0):
        _write(file, features)
    return features


class _Parts:
    """This process's batches, until all processes' are put together."""

    def __init__(
        self,
        kind: Kind,
        dtype: torch.dtype,
        device: torch.device,
        world_size: int,
        expected: int,  # samples of the whole set; 0 where nobody has counted them
        disk: Path | None,
    ) -> None:
        self._kind, self._dtype, self._device, self._world_size = kind, dtype, device, world_size
        self._expected, self._disk = expected, disk
        self._rows: dict[int, tuple[str, str]] = {}
        self._batches: deque[tuple[tuple[int, ...], Tensor]] = deque()

    def add(self, indices: tuple[int, ...], rows: list[tuple[str, str]], values: Tensor) -> None:
        values = values.to("cpu", self._dtype)
        if self._disk is None:
            self._check_memory(len(self._rows), len(rows), values[0])
        self._rows.update(zip(indices, rows, strict=True))
        self._batches.append((indices, self._empty(values.shape).copy_(values)))

    def _check_memory(self, there: int, new: int, row: Tensor) -> None:
        """At the first batch what is to come is told; where it is not known, each doubling is looked at."""
        first, doubled = there == 0, (there + new).bit_length() > there.bit_length()
        if not (first or (doubled and not self._expected)):
            return
        # Every process ends with everything, and while that is filled has its own part; one machine's share its memory.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self._world_size))
        local += local > 1
        samples = self._expected or 2 * (there + new)
        needed, free = samples * row.numel() * row.element_size() * local, available_bytes()
        shape = " x ".join(map(str, (samples, *row.shape)))
        if first and self._expected:
            logger.info("%s features of %s: %.2f GB of memory", self._kind, shape, needed / 1e9)
        if free is not None and needed > free:
            raise UserError(
                f"{self._kind} features of {shape} need {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are "
                "free; keep them on disk (--feature-disk) or in float16, evaluate fewer samples, or use pooled features"
            )

    def assembled(self, skips: Mapping[str, list[str]]) -> Features:
        """Batch by batch, sent by the process that has it; what is copied is let go, so nothing is held twice."""
        rows = gathered(self._rows, self._world_size)
        row_of = {index: row for row, index in enumerate(rows)}
        mine = ([indices for indices, _ in self._batches], self._shape(), dict(skips))
        everyone = all_gathered(mine, self._world_size)
        shape = next(shape for _, shape, _ in everyone if shape)
        values = self._empty((len(rows), *shape))
        rank = torch.distributed.get_rank() if self._world_size > 1 else 0
        for source, (batches, _, _) in enumerate(everyone):
            for indices in batches:
                part = self._batches.popleft()[1] if source == rank else torch.empty(len(indices), *shape)
                values[[row_of[index] for index in indices]] = self._sent(part.to(self._dtype), source)
        keys, labels = zip(*rows.values(), strict=True)
        return Features(self._kind, keys, labels, values, all_keys([keys for _, _, keys in everyone]))

    def _empty(self, shape: Sequence[int]) -> Tensor:
        return own_pages(shape, self._dtype) if self._disk is None else on_disk(shape, self._dtype, self._disk)

    def _shape(self) -> tuple[int, ...]:
        return tuple(self._batches[0][1].shape[1:]) if self._batches else ()

    def _sent(self, part: Tensor, source: int) -> Tensor:
        if self._world_size == 1:
            return part
        part = part.to(self._device).contiguous()  # NCCL sends from the device alone
        torch.distributed.broadcast(part, src=source)
        return part.cpu()


def _on_all(there: bool, world_size: int) -> bool:
    return all(all_gathered(there, world_size))


def _write(file: Path, features: Features) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    torch.save({**vars(features), "keys": list(features.keys), "labels": list(features.labels)}, unfinished)
    unfinished.rename(file)


def _read(file: Path) -> Features:
    """Mapped, not read: the file's pages need no memory of their own. Raises UserError."""
    try:
        known = torch.load(file, weights_only=True, mmap=True)
        return Features(**{**known, "keys": tuple(known["keys"]), "labels": tuple(known["labels"])})
    except Exception as error:  # torch, zipfile and pickle each have their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: features that cannot be read ({reason}); delete the file") from error
