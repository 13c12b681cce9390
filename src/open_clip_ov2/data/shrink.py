"""One tar to the same tar with smaller images: every other entry byte for byte, and a report of what was dropped."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from open_clip_ov2.data.decode import EncodedImage, pil_errors_skip
from open_clip_ov2.data.samples import IMAGE_SUFFIXES
from open_clip_ov2.data.sidecars import CaptionSet, sidecar_path, write_sidecar
from open_clip_ov2.data.skips import BROKEN_SHARD, DOTTED, MISSING_IMAGE, SkipSample, missing
from open_clip_ov2.data.tars import APART, read_tar
from open_clip_ov2.errors import UserError
from open_clip_ov2.files import written_whole

OPTIONS: dict[str, dict[str, Any]] = {"JPEG": {"optimize": True}, "PNG": {"optimize": True}, "WEBP": {}}


@dataclass(frozen=True)
class Shrink:
    """`short_side` in px: smaller images are copied. `quality`: of JPEG and WebP, 1 to 95."""

    short_side: int
    quality: int
    max_image_pixels: int


@dataclass(frozen=True)
class ShardReport:
    """Samples in and out, bytes of the new tar, and what was dropped: (key, cause, detail)."""

    name: str
    source: str
    samples_in: int
    samples_out: int
    bytes_out: int
    dropped: tuple[tuple[str, str, str], ...]
    broken: str = ""


def shrink_shard(source: str, target: Path, shrink: Shrink, captions: Sequence[CaptionSet] = ()) -> ShardReport:
    """Write `target` whole or not at all, after its sidecars in a folder beside it for each caption set. Raises
    UserError if it cannot be written."""
    try:
        with written_whole(target) as file:
            lines: dict[str, list[bytes]] = {one.name: [] for one in captions}
            report = _write(source, target.name, file, shrink, captions, lines)
            for name, found in lines.items():
                write_sidecar(sidecar_path(target.parent / name, target.name), map(json.loads, found))
            return report
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}); finished shards are whole: free some space and "
            "run the same command"
        ) from error


def _write(
    source: str,
    name: str,
    file: IO[bytes],
    shrink: Shrink,
    captions: Sequence[CaptionSet],
    lines: Mapping[str, list[bytes]],
) -> ShardReport:
    broken: list[str] = []
    dropped, samples_in = [], 0
    with tarfile.open(fileobj=file, mode="w") as tar:
        for samples_in, sample in enumerate(read_tar(source, broken.append, captions), 1):  # noqa: B007
            found = {one: sample.pop(one) for one in lines}
            try:
                entries = shrunk_entries(sample, shrink)
            except SkipSample as error:
                dropped.append((sample["__key__"], error.cause, error.detail))
                continue
            for one, line in found.items():
                lines[one].append(line)
            for suffix, data in entries.items():
                info = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    misnamed = [f"{key}: {cause} ({detail})" for key, cause, detail in dropped if DOTTED in detail]
    if refused := [reason for reason in broken if APART in reason] + misnamed:  # whose captions would be lost
        raise UserError(f"{source}: {refused[0]}")
    if not samples_in and broken:
        raise UserError(f"{source}: {BROKEN_SHARD}, nothing in it can be read ({broken[0]}); repair it or leave it out")
    written = samples_in - len(dropped)
    return ShardReport(name, source, samples_in, written, file.tell(), tuple(dropped), "".join(broken[:1]))


def shrunk_entries(sample: Mapping[str, Any], shrink: Shrink) -> dict[str, bytes]:
    """A sample's entries by suffix, its images smaller. Raises SkipSample: no image, or one that is broken."""
    entries = {suffix: data for suffix, data in sample.items() if not suffix.startswith("__")}
    images = [suffix for suffix in entries if suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise missing(MISSING_IMAGE, entries, IMAGE_SUFFIXES)
    return entries | {suffix: shrunk_image(entries[suffix], shrink) for suffix in images}


def shrunk_image(data: bytes, shrink: Shrink) -> bytes:
    """The image upright, its short side at most `short_side`, without metadata; JPEG unless it is PNG or WebP.

    Nothing is enlarged; what needs neither turning nor shrinking stays as it is. Raises SkipSample.
    """
    encoded = EncodedImage(data, shrink.max_image_pixels)
    small = encoded.shrunk(shrink.short_side)
    if small is None:
        return data
    kind = encoded.format if encoded.format in OPTIONS else "JPEG"
    buffer = io.BytesIO()
    with pil_errors_skip(shrink.max_image_pixels):
        small.save(buffer, kind, quality=shrink.quality, exif=b"", **OPTIONS[kind])
    return buffer.getvalue()
