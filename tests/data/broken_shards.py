"""Real tars, good and broken, and the callables that a loader is given."""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import random
import signal
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from open_clip_ov2.data.captions import parse_caption_keys

TXT = parse_caption_keys("txt")
Member = tuple[str, bytes]


@functools.cache
def picture(number: int = 0, fmt: str = "png", side: int = 12) -> bytes:
    """An encoded square of noise, another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, fmt)
    return buffer.getvalue()


def sample(number: int, **changed: bytes | None) -> list[Member]:
    """A good sample's files; `changed` replaces one by suffix, or with None leaves it out."""
    files: dict[str, bytes | None] = {"png": picture(number), "txt": f"caption {number}".encode()}
    files |= changed
    return [(f"{number:05d}.{suffix}", data) for suffix, data in files.items() if data is not None]


def write_tar(path: Path, samples: Iterable[Sequence[Member]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for members in samples:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def good_tars(folder: Path, sizes: Sequence[int]) -> tuple[str, ...]:
    """Tars with so many samples each; keys count on from tar to tar."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(
        str(write_tar(folder / f"{index:03d}.tar", [sample(start + n) for n in range(size)]))
        for index, (start, size) in enumerate(zip(starts, sizes, strict=True))
    )


def cut(path: Path, size: int) -> Path:
    """The tar without what comes after `size` bytes."""
    path.write_bytes(path.read_bytes()[:size])
    return path


def giant_png(width: int = 20_000, height: int = 20_000) -> bytes:
    """A valid black picture of one bit a pixel: 50 MB of zeros, 50 kB compressed."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# --- what a loader is given ------------------------------------------------------------------------------


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


def random_crop(image: Image.Image) -> Tensor:
    """6 px square; draws from torch, random and numpy, as transforms in the wild do."""
    left = int(torch.randint(0, image.width - 5, ()))
    top = random.randrange(image.height - 5)
    crop = to_tensor(image.crop((left, top, left + 6, top + 6)))
    return crop.flip(-1) if np.random.rand() < 0.5 else crop


def kill_own_worker(image: Image.Image) -> Tensor:
    assert get_worker_info() is not None, "would kill the test itself"
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def workers_of(start: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What `start` gives, and the processes that it started: those of earlier tests may still be there."""
    before = {process.pid for process in multiprocessing.active_children()}
    result = start()
    return result, [child.pid for child in multiprocessing.active_children() if child.pid not in before and child.pid]


def byte_tokens(texts: list[str]) -> Tensor:
    """Bytes + 1, padded with 0 to `(B, 16)`."""
    ids_BL = torch.zeros(len(texts), 16, dtype=torch.int64)
    for row, text in zip(ids_BL, texts, strict=True):
        ids = [byte + 1 for byte in text.encode()[:16]]
        row[: len(ids)] = torch.tensor(ids)
    return ids_BL


def settings(**changed: Any) -> dict[str, Any]:
    """Keyword arguments of TrainLoader."""
    usual = {"batch_size": 2, "num_workers": 0, "seed": 3, "rank": 0, "world_size": 1, "caption_keys": TXT}
    return {**usual, "num_samples": 8, **changed}
