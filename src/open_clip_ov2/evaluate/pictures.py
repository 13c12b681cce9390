"""Images to be captioned, from files, folders, tars, csv files and pipes, and the captions that a model gives them.

Shapes: C channels, H and W pixels.
"""

from __future__ import annotations

import contextlib
import csv
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_clip_ov2.data.captions import CaptionKey, all_captions, parse_caption_keys
from open_clip_ov2.data.crop import as_batch, budget_of
from open_clip_ov2.data.samples import IMAGE_ENTRY, SUFFIXES, Decoder, ImageFile, rgb_image
from open_clip_ov2.data.shards import WebDatasetSource, expand_shards
from open_clip_ov2.data.sidecars import TAR, CaptionSet
from open_clip_ov2.data.skips import SkipCounter, SkipSample
from open_clip_ov2.data.sources import CsvSource, csv_lines, image_names
from open_clip_ov2.errors import UserError, naming
from open_clip_ov2.evaluate.eval_model import EvalModel
from open_clip_ov2.evaluate.options import CaptionOptions

BATCH_SIZE = 32
TAR_MARK, MARK_AT = b"ustar", 257  # POSIX.1-2017, pax, "ustar Interchange Format": the field `magic`
Raw = dict[str, Any]


@dataclass(frozen=True)
class Generated:
    """A caption and its log-likelihood in nats: of all its tokens and its end, given the image."""

    text: str
    log_likelihood: float


@dataclass(frozen=True)
class Seen:
    """What the encoder gets, uint8 `(H, W, 3)`, and the share of draws that kept each patch, `(rows, columns)`."""

    pixels: np.ndarray
    kept: np.ndarray


@dataclass(frozen=True)
class Picture:
    """`image`: a PIL image in RGB. `captions`: the true ones, where there are any. `generated`, likeliest first, and
    `seen`: where `CaptionOptions` ask for them."""

    name: str
    image: Any
    captions: tuple[str, ...] = ()
    generated: tuple[Generated, ...] = ()
    seen: Seen | None = None


def captions_of(
    model: EvalModel, images: Iterable[str | Path | Picture], options: CaptionOptions, skips: SkipCounter | None = None
) -> Iterator[tuple[Picture, str]]:
    """Each image with its best caption; paths are read by `pictures`. What cannot be used is counted in `skips`. With
    several draws, draw n keeps the tokens that belong to the key "draw n", and the best caption is the one of all that
    were generated with the greatest mean over the draws of log p(caption | the kept tokens). Raises UserError."""
    if options.draws > 1 or options.show_tokens:
        model.kept([""])  # raises UserError for a model that drops no tokens
    if options.num_captions > 1 and options.generation_type == "greedy" and options.draws == 1:
        raise UserError("--num-captions: greedy finds one caption of an image; choose top_k, top_p or beam_search")
    if options.keep_ratio is not None:
        model = model.with_keep_ratio(options.keep_ratio)
    skips = skips or SkipCounter()
    every = chain.from_iterable([one] if isinstance(one, Picture) else pictures([one], skips=skips) for one in images)
    usable = _usable(every, model, skips)
    while batch := list(islice(usable, BATCH_SIZE)):
        try:
            yield from _captioned(model, batch, options)
        except ValueError as error:  # the model's own, of an option out of its range
            raise UserError(str(error)) from error


def _usable(images: Iterable[Picture], model: EvalModel, skips: SkipCounter) -> Iterator[tuple[Picture, Tensor]]:
    """Images that the model's transform takes, with their pixels `(C, H, W)`."""
    decoder = Decoder(model.preprocess, ())
    for picture in images:
        try:
            pixels_CHW = decoder.pixels({IMAGE_ENTRY: picture.image})
        except SkipSample as error:
            skips.add(error.cause, error.detail, "", picture.name)
            continue
        yield picture, pixels_CHW


def _captioned(
    model: EvalModel, batch: Sequence[tuple[Picture, Tensor]], options: CaptionOptions
) -> Iterator[tuple[Picture, str]]:
    images_BCHW = as_batch([pixels for _, pixels in batch], model.preprocess)
    names = [picture.name for picture, _ in batch]
    draws = [names] if options.draws == 1 else [[f"draw {n}"] * len(batch) for n in range(1, options.draws + 1)]
    each = 1 if options.generation_type == "greedy" else options.num_captions
    texts = [model.generate(images_BCHW, keys, num_captions=each, **options.generation) for keys in draws]
    for row, (picture, pixels_CHW) in enumerate(batch):
        # One of each, in the order in which they were generated.
        found = list(dict.fromkeys(chain.from_iterable(of[row * each : (row + 1) * each] for of in texts)))
        keys = [of[row] for of in draws]
        if options.scored:
            picture = replace(picture, generated=_ranked(model, pixels_CHW, keys, found)[: options.num_captions])
            found = [one.text for one in picture.generated]
        if options.show_tokens:
            budget = budget_of(model.preprocess)
            height, width = pixels_CHW.shape[1:]
            grid = (height // budget.patch, width // budget.patch) if budget else None
            kept = model.kept(keys, grid).float().mean(dim=0).numpy()
            picture = replace(picture, seen=Seen(plain_pixels(model.preprocess, pixels_CHW), kept))
        yield picture, found[0]


def _ranked(model: EvalModel, pixels_CHW: Tensor, keys: Sequence[str], texts: list[str]) -> tuple[Generated, ...]:
    """Captions of one image, likeliest first, by the mean over the keys."""
    ids_CL = model.tokenize(texts)
    image = as_batch([pixels_CHW], model.preprocess)
    nll_KC = torch.cat([model.nll(model.prefix(image, [key]), ids_CL) for key in keys])
    means = (-nll_KC.double().mean(dim=0)).tolist()
    return tuple(sorted(map(Generated, texts, means), key=lambda one: -one.log_likelihood))


def plain_pixels(preprocess: Any, pixels_CHW: Tensor) -> np.ndarray:
    """uint8 `(H, W, 3)`: torchvision's Normalize undone, where the transform ends in one."""
    last = list(getattr(preprocess, "transforms", [None]))[-1]
    if hasattr(last, "mean") and hasattr(last, "std"):
        mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in (last.mean, last.std))
        pixels_CHW = pixels_CHW * std + mean
    return (pixels_CHW * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def pictures(
    paths: Iterable[str | Path],
    caption_keys: str = "txt",
    every: int = 1,
    skips: SkipCounter | None = None,
    captions: tuple[CaptionSet, ...] = (),
) -> Iterator[Picture]:
    """Every Nth image of all that the paths hold; what cannot be used is counted in `skips`. A path is an image file, a
    folder with images at any depth, tars as `ov2 train` takes them (braces, `::`, `pipe:`), a csv, a pipe with an image
    or a tar, or `-` for standard input. `captions` are sets beside the tars. Raises UserError, at once, for a path that
    does not exist or a folder without images."""
    counter = skips or SkipCounter()
    with naming("--caption-keys"):
        keys = parse_caption_keys(caption_keys)
    found = [_samples(str(path), keys, counter, captions) for path in paths]
    return _decoded(islice(chain.from_iterable(found), 0, None, every), keys, counter)


def _decoded(samples: Iterable[Raw], keys: tuple[CaptionKey, ...], skips: SkipCounter) -> Iterator[Picture]:
    for raw in samples:
        captions: list[str] = []
        with contextlib.suppress(SkipSample):  # captions are shown beside the generated ones, and are not needed
            captions = all_captions(raw, keys)
        try:
            image = rgb_image(raw)
        except SkipSample as error:
            key, url = raw["__key__"], raw["__url__"]
            skips.add(error.cause, error.detail, "" if key == url else key, url)
            continue
        yield Picture(raw["__key__"], image, tuple(captions))


def _samples(
    path: str, keys: tuple[CaptionKey, ...], skips: SkipCounter, captions: tuple[CaptionSet, ...]
) -> Iterable[Raw]:
    """Raw samples of one path. Raises UserError."""
    path = "/dev/stdin" if path == "-" else path
    name = path.lower()
    if path.startswith("pipe:") or "://" in path or TAR.search(path):
        return WebDatasetSource(expand_shards(path)[0], captions=captions).in_order(skips)
    if captions:
        raise UserError(f"--captions {captions[0]}: captions stand beside tars, and {path} is not one")
    if not (found := Path(path)).exists():
        raise UserError(f"{path}: no such file or folder")
    if found.is_dir():
        files = [found / inside for inside in sorted(image_names(found))]
        if not files:
            raise UserError(f"{path}: no image in this folder ({', '.join(SUFFIXES)}); tars in it are named themselves")
        return map(_of_file, files)
    if name.endswith((".csv", ".tsv")):
        return _csv(found, keys).in_order(skips)
    return [_of_file(found)] if found.suffix.lower() in SUFFIXES else _of_any_file(found, skips)


def _of_file(file: Path) -> Raw:
    return {"__key__": str(file), "__url__": str(file), IMAGE_ENTRY: ImageFile((str(file),))}


def _of_any_file(file: Path, skips: SkipCounter) -> Iterator[Raw]:
    """A file or a pipe whose name does not say what it is: a tar by its mark, otherwise an image. It is read once."""
    try:
        data = file.read_bytes()
    except OSError:
        yield _of_file(file)  # counted with the reason when it is decoded
        return
    if not data.startswith(TAR_MARK, MARK_AT):
        yield {**_of_file(file), IMAGE_ENTRY: data}
        return
    with tempfile.NamedTemporaryFile(suffix=".tar") as copy:
        copy.write(data)
        copy.flush()
        yield from WebDatasetSource((copy.name,)).in_order(skips)


def _csv(path: Path, keys: tuple[CaptionKey, ...]) -> CsvSource:
    """Images are in the column `filepath` (OpenCLIP's --csv-img-key) or else in the first. Raises UserError."""
    header = next(iter(csv_lines(path)), "")
    separator = "\t" if "\t" in header else ","
    columns = next(csv.reader([header], delimiter=separator), []) or [""]
    image_column = "filepath" if "filepath" in columns else columns[0]
    captions = tuple(key.entry for key in keys if key.entry in columns)
    return CsvSource(path, separator=separator, image_column=image_column, caption_columns=captions)
