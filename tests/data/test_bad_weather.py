"""Deliberately broken shards. Oracle: the counts are known, because the shards are made here."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import signal
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from open_clip_ov2.data import skips
from open_clip_ov2.data.captions import parse_caption_keys
from open_clip_ov2.data.loader import EvalLoader, TrainLoader
from open_clip_ov2.data.sources import WebDatasetSource, expand_shards
from open_clip_ov2.errors import UserError

KEYS = parse_caption_keys("json:recaption,txt")


def tokenize(texts: list[str]) -> torch.Tensor:
    if "untokenizable" in texts[0]:
        raise ValueError("no such word")
    return torch.tensor([[len(text), 1] for text in texts])


def transform(image: Image.Image) -> torch.Tensor:
    if image.size == (13, 13):
        raise RuntimeError("unlucky")
    return to_tensor(image.resize((4, 4)))


def picture(size: int = 8, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((size, size), 50).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def huge_png(side: int = 20_000) -> bytes:
    """A valid 1-bit grey PNG of side x side zero pixels; some 50 KB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * (1 + side // 8) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def good(index: int) -> dict[str, bytes]:
    return {"png": picture(), "txt": f"caption {index}".encode()}


BAD: dict[str, tuple[str, Callable[[], dict[str, bytes]]]] = {
    "corrupt jpeg": (skips.UNDECODABLE_IMAGE, lambda: {"jpg": b"\xff\xd8\xff not a jpeg", "txt": b"x"}),
    "cut jpeg": (skips.UNDECODABLE_IMAGE, lambda: {"jpg": picture(64, "JPEG")[:400], "txt": b"x"}),
    "no image": (skips.MISSING_IMAGE, lambda: {"txt": b"x"}),
    "no caption": (skips.MISSING_CAPTION, lambda: {"png": picture()}),
    "no such json field": (skips.MISSING_CAPTION, lambda: {"png": picture(), "json": b'{"other": "x"}'}),
    "empty caption": (skips.EMPTY_CAPTION, lambda: {"png": picture(), "txt": b""}),
    "blank caption": (skips.EMPTY_CAPTION, lambda: {"png": picture(), "txt": b" \n\t "}),
    "bad utf-8": (skips.BAD_UTF8, lambda: {"png": picture(), "txt": b"caf\xe9"}),
    "bad json": (skips.BAD_JSON, lambda: {"png": picture(), "json": b'{"recaption": '}),
    "number in json": (skips.BAD_JSON, lambda: {"png": picture(), "json": json.dumps({"recaption": 3}).encode()}),
    "20,000 px": (skips.TOO_MANY_PIXELS, lambda: {"png": huge_png(), "txt": b"x"}),
    "transform": (skips.TRANSFORM_FAILED, lambda: {"png": picture(13), "txt": b"x"}),
    "tokenizer": ("tokenizer failed", lambda: {"png": picture(), "txt": b"untokenizable"}),
}


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for index, sample in enumerate(samples):
            for suffix, data in sample.items():
                info = tarfile.TarInfo(f"{path.stem}-{index:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def train_loader(paths: list[Path], samples: int, **more: Any) -> TrainLoader:
    flags = {"batch_size": 2, "num_workers": 0, "seed": 0, "rank": 0, "world_size": 1, "shuffle_buffer": 4, **more}
    source = WebDatasetSource(tuple(map(str, paths)))
    return TrainLoader(source, transform, tokenize, caption_keys=KEYS, num_samples=samples, **flags)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_bad_sample_is_skipped_and_counted_by_cause(tmp_path: Path, num_workers: int) -> None:
    samples = [make() for _, make in BAD.values()]
    mixed = [sample for index, bad in enumerate(samples) for sample in (bad, good(index))]
    path = write_tar(tmp_path / "mixed.tar", mixed)
    source = WebDatasetSource((str(path),))
    begin = time.monotonic()
    loader = EvalLoader(source, transform, tokenize, batch_size=4, num_workers=num_workers, caption_keys=KEYS)
    captions = {caption for batch in loader for caption in batch.captions}
    assert time.monotonic() - begin < 20
    assert captions == {f"caption {index}" for index in range(len(BAD))}
    expected: dict[str, int] = {}
    for cause, _ in BAD.values():
        expected[cause] = expected.get(cause, 0) + 1
    assert loader.skips == expected


def test_training_counts_them_too_and_goes_on(tmp_path: Path) -> None:
    samples = [make() for name, (_, make) in BAD.items() if name != "20,000 px"]
    path = write_tar(tmp_path / "mixed.tar", [*samples, *(good(index) for index in range(8))])
    loader = train_loader([path], 8)
    batches = list(loader)
    assert len(batches) == loader.num_batches == 4
    assert {caption for batch in batches for caption in batch.captions} == {f"caption {i}" for i in range(8)}
    assert sum(loader.skips.values()) <= len(samples)
    assert loader.skips.get(skips.EMPTY_CAPTION, 0) <= 2


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_a_truncated_tar_gives_what_came_before(tmp_path: Path, share: float) -> None:
    """Half of the shards are cut off; everything of the others and the head of the cut ones is used, once."""
    whole = [write_tar(tmp_path / f"whole{i}.tar", [good(10 * i + j) for j in range(6)]) for i in range(2)]
    broken = [
        cut(write_tar(tmp_path / f"cut{i}.tar", [{"png": picture(64), "txt": b"head"} for _ in range(6)]), share)
        for i in range(2)
    ]
    source = WebDatasetSource(tuple(map(str, [broken[0], whole[0], broken[1], whole[1]])))
    loader = EvalLoader(source, transform, tokenize, batch_size=4, num_workers=0, caption_keys=KEYS)
    captions = [caption for batch in loader for caption in batch.captions]
    assert len([caption for caption in captions if caption != "head"]) == 12
    assert 2 <= captions.count("head") < 12
    assert loader.skips[skips.BROKEN_SHARD] == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_all_broken_list_is_an_error_soon(tmp_path: Path, num_workers: int) -> None:
    paths = [write_tar(tmp_path / f"{i}.tar", [BAD["empty caption"][1]() for _ in range(5)]) for i in range(3)]
    (tmp_path / "garbage.tar").write_bytes(b"this is no tar" * 100)
    begin = time.monotonic()
    with pytest.raises(UserError, match="no usable sample") as caught:
        list(train_loader([*paths, tmp_path / "garbage.tar"], 100, num_workers=num_workers))
    assert time.monotonic() - begin < 30
    assert "empty caption" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no usable sample \(15 empty caption"):
        list(EvalLoader(WebDatasetSource(tuple(map(str, paths))), transform, tokenize, batch_size=4,
                        num_workers=num_workers, caption_keys=KEYS))  # fmt: skip


def test_missing_shards_and_folders_are_errors_before_training(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [good(0)])
    with pytest.raises(UserError, match=r"2 of 3 shards do not exist: .*/1\.tar, .*/2\.tar"):
        expand_shards(f"{tmp_path}/{{0..2}}.tar")
    with pytest.raises(UserError, match="is a folder"):
        expand_shards(str(tmp_path))


def test_a_killed_worker_is_a_clear_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [good(index) for index in range(6)])
    loader = iter(train_loader([path], 100_000, num_workers=1))
    next(loader)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a data worker died .*--workers"):
        for _ in loader:
            pass


def test_log_lines_are_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "0.tar", [{"png": b"bad", "txt": b"x"} for _ in range(200)] + [good(0)])
    with caplog.at_level(logging.WARNING):
        loader = EvalLoader(
            WebDatasetSource((str(path),)), transform, tokenize, batch_size=4, num_workers=0, caption_keys=KEYS
        )
        list(loader)
    lines = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(lines) == skips.FIRST_LINES
    assert "0-0000" in lines[0]
    assert "undecodable image" in lines[0]
    assert loader.skips == {skips.UNDECODABLE_IMAGE: 200}
