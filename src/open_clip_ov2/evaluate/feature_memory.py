"""How much memory is free, and tensors outside the allocator: in pages of their own, or in a file."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from open_clip_ov2.errors import UserError

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


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
