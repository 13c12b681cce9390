"""One tar -> the same tar with smaller pictures: every other entry byte for byte, and a report of what is gone."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from open_clip_ov2.data.samples import IMAGE_SUFFIXES, open_image
from open_clip_ov2.data.skips import (
    BROKEN_SHARD,
    MISSING_IMAGE,
    SkipCounter,
    SkipSample,
)
from open_clip_ov2.data.tars import read_tar
from open_clip_ov2.errors import UserError

ORIENTATION = 0x0112  # EXIF 2.3, tag 274: 1 is upright
# Decoded at no less than this times the new size, before the filter proper: PIL's documentation calls 3 "close to
# fair resampling, almost indistinguishable".
REDUCING_GAP = 3.0
OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"optimize": True}, "PNG": {"optimize": True}, "WEBP": {}}


@dataclass(frozen=True)
class Shrink:
    """`short_side` in px: what is smaller already is copied. `quality`: of JPEG and WebP, 1 to 95."""

    short_side: int
    quality: int
    max_image_pixels: int


@dataclass(frozen=True)
class ShardReport:
    """Samples in and out, bytes of the tars, and what was dropped: (key, cause, detail)."""

    name: str
    source: str
    samples_in: int
    samples_out: int
    bytes_out: int
    dropped: tuple[tuple[str, str, str], ...]
    broken: str = ""

    def check(self) -> None:
        """Raises UserError where a sample is neither written nor reported."""
        if self.samples_in != self.samples_out + len(self.dropped):
            raise UserError(
                f"{self.source}: {self.samples_in} samples in, {self.samples_out} out and {len(self.dropped)} dropped: "
                "they do not add up; is somebody else writing there?"
            )


class _Problems(SkipCounter):
    """Keeps what read_tar says of a broken tar."""

    detail = ""

    def add(self, cause: str, detail: str, key: str, url: str) -> None:
        self.detail = self.detail or detail


def shrink_shard(source: str, target: Path, shrink: Shrink) -> ShardReport:
    """Writes `target` whole or not at all: under a temporary name, counted again, and renamed.

    Raises UserError if it cannot be written, or the counts do not agree.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        report = _write(source, target.name, part, shrink)
        report.check()
        part.replace(target)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}); finished shards are whole: free some space and "
            "give the same command"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return report


def _write(source: str, name: str, part: Path, shrink: Shrink) -> ShardReport:
    problems, dropped, samples_in = _Problems(log=False), [], 0
    with open(part, "wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for samples_in, sample in enumerate(read_tar(source, problems), 1):  # noqa: B007
                try:
                    entries = shrunk_entries(sample, shrink)
                except SkipSample as error:
                    dropped.append((sample["__key__"], error.cause, error.detail))
                    continue
                for suffix, data in entries.items():
                    info = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    if not samples_in and problems.detail:
        raise UserError(
            f"{source}: {BROKEN_SHARD}, nothing in it can be read ({problems.detail}); mend it or leave it out"
        )
    written = sum(1 for _ in read_tar(str(part), SkipCounter(log=False)))
    return ShardReport(name, source, samples_in, written, size, tuple(dropped), problems.detail)


def shrunk_entries(sample: Mapping[str, Any], shrink: Shrink) -> dict[str, bytes]:
    """A sample's entries by suffix, its pictures smaller. Raises SkipSample: no picture, or one that is broken."""
    entries = {suffix: data for suffix, data in sample.items() if not suffix.startswith("__")}
    pictures = [suffix for suffix in entries if suffix.lower() in IMAGE_SUFFIXES]
    if not pictures:
        raise SkipSample(MISSING_IMAGE, f"none of {', '.join(IMAGE_SUFFIXES)}")
    return entries | {suffix: shrunk_picture(entries[suffix], shrink) for suffix in pictures}


def shrunk_picture(data: bytes, shrink: Shrink) -> bytes:
    """The picture upright, its short side at most `short_side`: same format, never enlarged; what needs neither turning
    nor shrinking stays as it is. No metadata. Raises SkipSample.
    """
    with open_image(data, shrink.max_image_pixels) as image:
        width, height = image.size
        scale = shrink.short_side / min(width, height)
        if scale >= 1 and image.getexif().get(ORIENTATION, 1) == 1:
            image.load()  # a broken one is found here rather than in training
            return data
        kind = image.format if image.format in OPTIONS else "JPEG"
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        if scale < 1:
            image.draft(None, (round(size[0] * REDUCING_GAP), round(size[1] * REDUCING_GAP)))
        small = _plain(image, kind)
        if scale < 1:
            small = small.resize(size, Image.Resampling.BICUBIC, reducing_gap=REDUCING_GAP)
        buffer = io.BytesIO()
        ImageOps.exif_transpose(small).save(buffer, kind, quality=shrink.quality, exif=b"", **OPTIONS[kind])
        return buffer.getvalue()


def _plain(image: Image.Image, kind: str) -> Image.Image:
    """In a mode that can be resampled and saved: grey, RGB, or with transparency where the format has it."""
    if image.mode in ("L", "RGB"):
        return image
    clear = kind != "JPEG" and (image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info)
    return image.convert("RGBA" if clear else "RGB")
