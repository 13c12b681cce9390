"""Sets to probe: pictures on disk, and features drawn from classes."""

from __future__ import annotations

import io
import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from open_clip_ov2.data.captions import CaptionKey
from open_clip_ov2.data.loader import EvalLoader
from open_clip_ov2.data.sources import ImageFolderSource, Source
from open_clip_ov2.evaluate.extraction import Features, cache_file, extract

CLS = CaptionKey("cls")
SIDE, PATCH = 8, 4


def to_integers(image: Image.Image) -> Tensor:
    """Pixels as they are, 0 to 255: sums of their products with small integers are exact in float32."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)


class PatchModel:
    """An encoder in integers: each patch times a fixed matrix. Equal results are equal bit for bit."""

    name = "patches"
    abilities = frozenset({"features"})
    device = torch.device("cpu")

    def __init__(self, width: int = 5) -> None:
        generator = torch.Generator().manual_seed(7)
        self._weight = torch.randint(-3, 4, (3 * PATCH * PATCH, width), generator=generator).float()

    def tokens(self, images_BCHW: Tensor) -> Tensor:
        patches = torch.nn.functional.unfold(images_BCHW, PATCH, stride=PATCH).transpose(1, 2)
        return patches @ self._weight

    def pooled(self, images_BCHW: Tensor) -> Tensor:
        return self.tokens(images_BCHW).sum(dim=1)


def loader_of(source: Source, **changed: Any) -> EvalLoader:
    usual: dict[str, Any] = {"batch_size": 3, "num_workers": 0, "group_by": CLS}
    return EvalLoader(source, to_integers, **{**usual, **changed})


# The same list as the training tests': seconds of imports, once.
multiprocessing.get_context("forkserver").set_forkserver_preload(["open_clip_ov2.openclip.run.runner"])


def extract_on_rank(rank: int, world_size: int, folder: Path, out: Path) -> None:
    """Features of a folder, of all pictures and of one, where a process has none, to `out/NAME-KIND-RANK.pt`."""
    torch.set_num_threads(1)
    store = f"file://{out / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    share: dict[str, Any] = {"rank": rank, "world_size": world_size, "batch_size": 2}
    for name, limit in (("all", None), ("one", 1)):
        loader = loader_of(ImageFolderSource(folder), num_samples=limit, **share)
        for kind in ("pooled", "tokens"):
            cache = cache_file(out / f"cache-{rank}", kind) if limit else None
            found = extract(PatchModel(), loader, kind, cache=cache)
            torch.save(vars(found), out / f"{name}-{kind}-{rank}.pt")
    torch.distributed.destroy_process_group()


def encoded(number: int) -> bytes:
    """A square of noise, another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_folder(folder: Path, counts: dict[str, int]) -> Path:
    """`folder/CLASS/NN.png`, so many of each class."""
    for start, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / name / f"{number:02d}.png").write_bytes(encoded(100 * start + number))
    return folder


def about(label: Any) -> bytes:
    return json.dumps({"about": {"label": label}}).encode()


def features(values: Tensor, labels: Sequence[str], keys: Sequence[str] | None = None) -> Features:
    return Features(tuple(keys or [f"k{row:04d}" for row in range(len(labels))]), tuple(labels), values, {})


def blobs(samples: int, classes: int, width: int, seed: int, spread: float = 1.0) -> tuple[Tensor, list[str]]:
    """Normal clouds around `classes` centres that are the same for every seed, in columns of very unequal scale."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed + 1)
    numbers = torch.randint(classes, (samples,), generator=generator)
    numbers[:classes] = torch.arange(classes)
    noise = spread * torch.randn(samples, width, generator=generator)
    scale = 10.0 ** torch.linspace(-0.5, 0.5, width)
    return (centres[numbers] + noise) * scale, [f"class {number:02d}" for number in numbers.tolist()]
