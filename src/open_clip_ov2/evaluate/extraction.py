"""Features of a whole set, computed once: what every probe starts from.

Shapes: M samples of the set, B batch, N image tokens, D width (evaluate/__init__.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from open_clip_ov2.data.loader import EvalLoader
from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.evaluate.eval_model import EvalModel
from open_clip_ov2.evaluate.gathering import all_gathered, gathered, gathered_keys, place
from open_clip_ov2.files import written_whole

logger = logging.getLogger(__name__)

Kind = Literal["pooled", "tokens", "penultimate"]
VERSION = 4  # of the cache file
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
SHARED_ROWS = 1 << 10  # summed over processes at a time


@dataclass(frozen=True)
class Features:
    """All usable samples in file order: `values` `(M, D)` for "pooled", `(M, N, D)` for "tokens" of the last and of the
    "penultimate" block; float32 on the CPU. A label is the text under the loader's `group_by`, "" where a sample has
    none. `skips`: keys of samples that could not be used, by cause, over all processes. `places`: of the samples in
    file order, as in `Described`: keys may be in a set twice."""

    keys: tuple[str, ...]
    labels: tuple[str, ...]
    values: Tensor
    skips: dict[str, list[str]]
    places: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)


def cache_file(folder: Path, kind: Kind, *depends_on: Any) -> Path:
    """Where features are kept that depend on this, JSON-ready: other values, another file."""
    text = json.dumps([VERSION, kind, *depends_on], sort_keys=True)
    return folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"


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
    model: EvalModel, loader: EvalLoader, kind: Kind = "pooled", *, cache: Path | None = None, disk: Path | None = None
) -> Features:
    """Features of the loader's set; the same on any number of processes, each of which gets all of them. `cache`: a
    file that they are read from if it is there, and written to otherwise. `disk`: a folder in which they are
    memory-mapped instead of held in RAM. Raises UserError if they need more memory than there is."""
    if cache and all(all_gathered(cache.is_file())):
        logger.info("%s: features read", cache)
        return _read(cache)
    encode = {"pooled": model.pooled, "tokens": model.tokens}.get(kind, partial(model.tokens, layer=-2))
    store = _Store(kind, loader.num_samples, disk)
    rows: dict[int, tuple[str, str]] = {}
    for batch in loader:
        store.put(batch.indices, encode(batch.images_BCHW.to(model.device)).float().cpu())
        rows.update(zip(batch.indices, zip(batch.keys, batch.groups, strict=True), strict=True))
    rows = gathered(rows)
    keys, labels = zip(*rows.values(), strict=True)
    places = tuple(rows)
    values = store.gathered(places, model.device)
    features = Features(keys, labels, values, gathered_keys(loader.skipped_keys), places)
    if cache and place()[0] == 0:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(cache) as out:
            torch.save(vars(features), out)
    return features


def _read(file: Path) -> Features:
    """Memory-mapped: the file's pages need no memory of their own. Raises UserError."""
    try:
        known = torch.load(file, weights_only=True, mmap=True)
        return Features(**known)
    except Exception as error:  # torch, zipfile and pickle each have their own
        raise UserError(f"{file}: features that cannot be read ({first_line(error)}); delete the file") from error


class _Store:
    """This process's features, each row at its sample's place in file order; zeros where another process has it."""

    def __init__(self, kind: Kind, expected: int, disk: Path | None) -> None:
        """`expected`: samples of the whole set; 0 where nobody has counted them."""
        self._kind, self._expected, self._disk = kind, expected, disk
        self._values_MD = torch.empty(0)

    def put(self, indices: Sequence[int], values_BD: Tensor) -> None:
        least = max(indices) + 1
        if least > len(self._values_MD):
            self._grow(self._expected if least <= self._expected else 2 * least, values_BD.shape[1:])
        self._values_MD[list(indices)] = values_BD

    def _grow(self, samples: int, shape: Sequence[int]) -> None:
        if self._disk is None:
            self._check_memory(samples, shape)
        before, self._values_MD = self._values_MD, zeros((samples, *shape), self._disk)
        if len(before):
            self._values_MD[: len(before)] = before

    def _check_memory(self, samples: int, shape: Sequence[int]) -> None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", place()[1]))  # every process of a machine ends with all features
        needed, free = 4 * samples * math.prod(shape) * local, available_bytes()
        size = " x ".join(map(str, (samples, *shape)))
        if self._expected:
            logger.info("%s features of %s: %.2f GB of memory", self._kind, size, needed / 1e9)
        if free is not None and needed > free:
            raise UserError(
                f"{self._kind} features of {size} need {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are "
                "free; keep them on disk (--feature-disk), evaluate fewer samples, or use pooled features"
            )

    def gathered(self, used: Sequence[int], device: torch.device) -> Tensor:
        """`(M, ...)`: the rows at `used`, ascending, of all processes; what was not usable gives way in place."""
        if place()[1] > 1:
            shape = max(all_gathered(tuple(self._values_MD.shape)), key=len)[1:]
            if len(self._values_MD) <= used[-1]:
                self._grow(used[-1] + 1, shape)
            for block in self._values_MD[: used[-1] + 1].split(SHARED_ROWS):
                shared = block.to(device, copy=True)  # NCCL sends from the device alone
                torch.distributed.all_reduce(shared)
                block.copy_(shared)
        for row, index in enumerate(used):
            if row != index:
                self._values_MD[row] = self._values_MD[index]
        return torch.from_numpy(self._values_MD.numpy()[: len(used)])  # torch.save would write all that a view is of


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """The kernel's MemAvailable, or what a container's limit (cgroup v2) leaves if that is less; None if not known."""
    known: list[int] = []
    with contextlib.suppress(OSError, KeyError, ValueError):
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        known.append(int(rows["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, KeyError, ValueError):
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))  # "max": no limit
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        known.append(max(0, limit - used + int(stat["inactive_file"])))  # cached files can be given back
    return min(known, default=None)


def zeros(shape: tuple[int, ...], folder: Path | None = None) -> Tensor:
    """float32, in RAM (pages that are taken when they are written to) or in a file without a name in `folder`. Raises
    UserError if there is no room: the file's blocks are reserved now, or writing to it could kill the process."""
    if folder is None:
        return torch.from_numpy(np.zeros(shape, np.float32))
    size = 4 * math.prod(shape)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))
    except OSError as error:
        raise UserError(
            f"{folder}: no room for {size / 1e9:.1f} GB of features ({error.strerror}); name another folder"
        ) from None
