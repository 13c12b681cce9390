"""Images to be captioned, from image files, folders and tars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from open_clip_ov2.data.captions import CaptionKey, all_captions, parse_caption_keys
from open_clip_ov2.data.decode import MAX_IMAGE_PIXELS, decode_image
from open_clip_ov2.data.samples import IMAGE_SUFFIXES, check_resized_size
from open_clip_ov2.data.shards import WebDatasetSource, expand_shards
from open_clip_ov2.data.skips import SkipSample
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.eval_model import EvalModel, lacking
from open_clip_ov2.evaluate.options import GenerationOptions

BATCH_SIZE = 32
SUFFIXES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)


@dataclass(frozen=True)
class Picture:
    """`image`: a PIL image. `captions`: the true ones that a tar has."""

    name: str
    image: Any
    captions: tuple[str, ...] = ()


def captions_of(
    model: EvalModel, images: Iterable[str | Path | Picture], options: GenerationOptions
) -> Iterator[tuple[Picture, str]]:
    """Each image with its generated caption; paths are read by `pictures`. Raises UserError."""
    lacks = lacking(model.name, model.abilities, ["caption"])
    if lacks:
        raise UserError(lacks)
    if options.keep_ratio is not None:
        model = model.with_keep_ratio(options.keep_ratio)
    every = chain.from_iterable([one] if isinstance(one, Picture) else pictures([one]) for one in images)
    while batch := list(islice(every, BATCH_SIZE)):
        for picture in batch:
            _check_size(picture, model)
        images_BCHW = torch.stack([model.preprocess(picture.image) for picture in batch])
        try:
            texts = model.generate(images_BCHW, [picture.name for picture in batch], **options.generation)
        except ValueError as error:  # the model's own, of an option out of its range
            raise UserError(str(error)) from error
        yield from zip(batch, texts, strict=True)


def _check_size(picture: Picture, model: EvalModel) -> None:
    """Raises UserError for an image that the model's transform would make too large."""
    try:
        check_resized_size(model.preprocess, picture.image, MAX_IMAGE_PIXELS)
    except SkipSample as error:
        raise UserError(f"{picture.name}: {error.cause} ({error.detail})") from error


def pictures(paths: Iterable[str | Path], caption_keys: str = "txt", every: int = 1) -> Iterator[Picture]:
    """Of a tar, every Nth image. Raises UserError for a path without images or an image that does not decode."""
    keys = parse_caption_keys(caption_keys)
    for path in map(str, paths):
        if path.endswith(".tar"):
            yield from _from_tar(path, keys, every)
            continue
        found = Path(path)
        if not found.exists():
            raise UserError(f"{path}: no such file or folder")
        files = sorted(file for file in found.rglob("*") if file.suffix.lower() in SUFFIXES)
        if found.is_dir() and not files:
            raise UserError(f"{path}: no image in this folder ({', '.join(SUFFIXES)})")
        for file in files if found.is_dir() else [found]:
            try:
                yield Picture(str(file), decode_image(file.read_bytes()))
            except SkipSample as error:
                raise UserError(f"{file}: {error.cause} ({error.detail})") from error
            except OSError as error:
                raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def _from_tar(path: str, keys: tuple[CaptionKey, ...], every: int) -> Iterator[Picture]:
    urls, _ = expand_shards(path)
    source = WebDatasetSource(urls=urls, weights=None, resampled=False)
    for index, raw in enumerate(source.in_order()):
        data = next((raw[suffix] for suffix in IMAGE_SUFFIXES if suffix in raw), None)
        if index % every or data is None:
            continue
        try:
            yield Picture(raw["__key__"], decode_image(data), tuple(all_captions(raw, keys)))
        except SkipSample as error:
            raise UserError(f"{path}: sample {raw['__key__']}: {error.cause} ({error.detail})") from error
