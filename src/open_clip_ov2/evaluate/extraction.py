"""Features of a whole set, computed once: what every probe starts from.

Shapes: M samples of the set, B batch, N image tokens, D width (evaluate/__init__.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from open_clip_ov2.data.eval_loader import EvalLoader
from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.evaluate.eval_model import EvalModel, lacking
from open_clip_ov2.evaluate.gathering import all_gathered, gathered, gathered_keys
from open_clip_ov2.files import written_whole

logger = logging.getLogger(__name__)

Kind = Literal["pooled", "tokens"]
VERSION = 2  # of the cache file
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Features:
    """All usable samples in file order: `values` `(M, D)` for "pooled", `(M, N, D)` for "tokens"; float32 on the CPU.

    A label is the text under the loader's `group_by`, "" where a sample has none. `skips`: keys of samples that could
    not be used, by cause, over all processes.
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
    """A folder of features. `identity` is what they depend on beside the loader's own fingerprint, JSON-ready: model,
    preprocessing, and `stamp` of the files of both checkpoint and data. Another identity is another file.
    """

    folder: Path
    identity: Mapping[str, Any]

    def file(self, kind: Kind, data: Mapping[str, Any]) -> Path:
        text = json.dumps([VERSION, kind, str(torch.float32), data, self.identity], sort_keys=True)
        return self.folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"


def stamp(paths: Sequence[str | Path]) -> str:
    """One hash of the names, sizes and modification times of files; of anything but a local file, of the name alone."""
    digest = hashlib.sha256()
    for path in paths:
        found = os.stat(path) if os.path.exists(path) else None
        size_time = (found.st_size, found.st_mtime_ns) if found else ()
        digest.update(repr((str(path), *size_time)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


@torch.no_grad()
def extract(
    model: EvalModel,
    loader: EvalLoader,
    world_size: int = 1,
    kind: Kind = "pooled",
    *,
    cache: Cache | None = None,
    disk: Path | None = None,
) -> Features:
    """Features of the loader's set; the same on any number of processes, each of which gets all of them.

    `disk`: a folder in which the features are memory-mapped instead of held in RAM; each process has a file of its own
    there. Raises UserError: a model without features, or more memory needed than there is.
    """
    lacks = lacking(model.name, model.abilities, ["features"])
    if lacks:
        raise UserError(f"{lacks}, so it cannot be probed")
    file = cache.file(kind, loader.fingerprint()) if cache else None
    if file and all(all_gathered(file.is_file(), world_size)):
        logger.info("%s: features read", file)
        return _read(file)
    parts = _Parts(kind, model.device, world_size, loader.num_samples, disk)
    encode = model.pooled if kind == "pooled" else model.tokens
    for batch in loader:
        rows = list(zip(batch.keys, batch.groups, strict=True))
        parts.add(batch.indices, rows, encode(batch.images_BCHW.to(model.device)).float().cpu())
    features = parts.assembled(loader.skipped_keys)
    if file and parts.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as out:
            torch.save({**vars(features), "keys": list(features.keys), "labels": list(features.labels)}, out)
    return features


class _Parts:
    """This process's batches, until those of all processes are put together."""

    def __init__(self, kind: Kind, device: torch.device, world_size: int, expected: int, disk: Path | None) -> None:
        """`expected`: samples of the whole set; 0 where nobody has counted them."""
        self._kind, self._device, self._world_size = kind, device, world_size
        self._expected, self._disk = expected, disk
        self._rows: dict[int, tuple[str, str]] = {}
        self._batches: deque[tuple[tuple[int, ...], Tensor]] = deque()
        self.rank = torch.distributed.get_rank() if world_size > 1 else 0

    def add(self, indices: tuple[int, ...], rows: list[tuple[str, str]], values: Tensor) -> None:
        if self._disk is None:
            self._check_memory(len(self._rows), len(rows), values[0])
        self._rows.update(zip(indices, rows, strict=True))
        self._batches.append((indices, self._empty(values.shape).copy_(values)))

    def _check_memory(self, there: int, new: int, row: Tensor) -> None:
        """At the first batch, for the whole set; where its size is not known, at each doubling."""
        first, doubled = there == 0, (there + new).bit_length() > there.bit_length()
        if not (first or (doubled and not self._expected)):
            return
        # Every process ends with all features and, while they are filled in, still has its own; one machine's processes
        # share its memory.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self._world_size))
        samples = self._expected or 2 * (there + new)
        needed, free = samples * row.numel() * row.element_size() * (local + (local > 1)), available_bytes()
        shape = " x ".join(map(str, (samples, *row.shape)))
        if first and self._expected:
            logger.info("%s features of %s: %.2f GB of memory", self._kind, shape, needed / 1e9)
        if free is not None and needed > free:
            raise UserError(
                f"{self._kind} features of {shape} need {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are "
                "free; keep them on disk (--feature-disk), evaluate fewer samples, or use pooled features"
            )

    def assembled(self, skips: Mapping[str, list[str]]) -> Features:
        """Batch by batch, sent by the process that has it; what is copied is let go, so nothing is held twice."""
        rows = gathered(self._rows, self._world_size)
        row_of = {index: row for row, index in enumerate(rows)}
        mine = (
            [indices for indices, _ in self._batches],
            tuple(self._batches[0][1].shape[1:]) if self._batches else (),
        )
        everyone = all_gathered(mine, self._world_size)
        shape = next(shape for _, shape in everyone if shape)
        values = self._empty((len(rows), *shape))
        for source, (batches, _) in enumerate(everyone):
            for indices in batches:
                part = self._batches.popleft()[1] if source == self.rank else torch.empty(len(indices), *shape)
                values[[row_of[index] for index in indices]] = self._sent(part, source)
        keys, labels = zip(*rows.values(), strict=True)
        return Features(self._kind, keys, labels, values, gathered_keys(skips, self._world_size))

    def _empty(self, shape: Sequence[int]) -> Tensor:
        return own_pages(shape) if self._disk is None else on_disk(shape, self._disk)

    def _sent(self, part: Tensor, source: int) -> Tensor:
        if self._world_size == 1:
            return part
        part = part.to(self._device).contiguous()  # NCCL sends from the device alone
        torch.distributed.broadcast(part, src=source)
        return part.cpu()


def _read(file: Path) -> Features:
    """Memory-mapped: the file's pages need no memory of their own. Raises UserError."""
    try:
        known = torch.load(file, weights_only=True, mmap=True)
        return Features(**{**known, "keys": tuple(known["keys"]), "labels": tuple(known["labels"])})
    except Exception as error:  # torch, zipfile and pickle each have their own
        raise UserError(f"{file}: features that cannot be read ({first_line(error)}); delete the file") from error


# --- memory: how much is free, and tensors outside the allocator, in pages of their own or in a file ----------


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """The kernel's MemAvailable, or what a container's limit (cgroup v2) leaves if that is less; None if not known."""
    found = [number for number in (_machine(meminfo), _container(cgroup)) if number is not None]
    return min(found, default=None)


def _machine(meminfo: Path) -> int | None:
    try:
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _container(cgroup: Path) -> int | None:
    """Cached pages of files count as used there, but can be given back: they are free too."""
    try:
        limit = int((cgroup / "memory.max").read_text())  # "max" where there is none
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat["inactive_file"]))
    except (OSError, KeyError, ValueError):
        return None


def own_pages(shape: Sequence[int]) -> Tensor:
    """An uninitialized float32 tensor that gives its memory back to the system when it goes: the allocator keeps what
    is freed below something that is still held (measured: a set collected in batches took twice its size).
    """
    pages = mmap.mmap(-1, 4 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.float32, count=math.prod(shape)).view(*shape)


def on_disk(shape: Sequence[int], folder: Path) -> Tensor:
    """An uninitialized float32 tensor whose memory is a file in `folder` that has no name any more: it goes with the
    tensor. Raises UserError if there is no room: the file's blocks are reserved now, or writing to it could kill the
    process.
    """
    size = 4 * math.prod(shape)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="features-") as file:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_file(file.name, shared=True, size=size // 4, dtype=torch.float32).view(*shape)
    except OSError as error:
        raise UserError(
            f"{folder}: no room for {size / 1e9:.1f} GB of features ({error.strerror}); name another folder"
        ) from None
