"""One raw sample -> image tensor and caption, with randomness of its own.

Shapes: C channels, H and W pixels.
"""

from __future__ import annotations

import contextlib
import io
import random
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from open_clip_ov2.data.captions import CaptionKey, all_captions, choose_caption
from open_clip_ov2.data.crop import RandomCrop
from open_clip_ov2.data.jpeg import read_header
from open_clip_ov2.data.skips import (
    MISSING_IMAGE,
    TOO_MANY_PIXELS,
    TRANSFORM_FAILED,
    UNDECODABLE_IMAGE,
    SkipSample,
)

MAX_IMAGE_PIXELS = 89_478_485  # where PIL starts to warn of a decompression bomb
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
IMAGE_ENTRY = "__image__"  # where a source that reads no tar puts an ImageFile or a picture


@dataclass(frozen=True)
class ImageFile:
    """A picture on disk, read only when it is used: the first of `candidates` that can be opened."""

    candidates: tuple[str, ...]

    def read(self) -> bytes:
        """Raises SkipSample if none can be opened."""
        for name in self.candidates:
            try:
                with open(name, "rb") as file:
                    return file.read()
            except (OSError, ValueError):  # ValueError: a name with a NUL in it
                continue
        raise SkipSample(MISSING_IMAGE, f"cannot open {' or '.join(self.candidates)}")


@dataclass(frozen=True)
class Decoder:
    """What turns a raw sample into a usable one. `transform` maps a PIL image to a tensor `(C, H, W)`; a RandomCrop is
    asked before the picture is decoded how large it has to be.
    """

    transform: Callable[[Image.Image], Tensor]
    caption_keys: tuple[CaptionKey, ...]
    max_image_pixels: int = MAX_IMAGE_PIXELS

    def train(self, raw: Mapping[str, Any], seed: int) -> tuple[Tensor, str]:
        """Image `(C, H, W)` and caption, crop and caption drawn from `seed`, a function of run, epoch, pass and key.

        Raises SkipSample. The caption is looked at first: that costs least.
        """
        rng = random.Random(seed)
        caption = choose_caption(raw, self.caption_keys, rng)
        crop_seed = rng.getrandbits(63)
        if isinstance(self.transform, RandomCrop):
            crop, data = self.transform, encoded_image(raw)
            return self._guarded(lambda: self._cropped(crop, data, crop_seed)), caption
        image = self.image(raw)
        with seeded(crop_seed):
            return self._guarded(lambda: self.transform(image)), caption

    def evaluate(self, raw: Mapping[str, Any]) -> tuple[Tensor, str]:
        """Image `(C, H, W)` and the first caption there is: evaluation draws nothing. Raises SkipSample.

        Without `caption_keys` no caption is looked for, and it is "".
        """
        caption = all_captions(raw, self.caption_keys)[0] if self.caption_keys else ""
        image = self.image(raw)
        with seeded(0):  # a transform that draws all the same neither varies nor disturbs the model's generator
            return self._guarded(lambda: self.transform(image)), caption

    def image(self, raw: Mapping[str, Any]) -> Image.Image:
        """The picture of a sample, RGB. Raises SkipSample."""
        data = encoded_image(raw)
        return data if isinstance(data, Image.Image) else decode_image(data, self.max_image_pixels)

    def _cropped(self, crop: RandomCrop, data: bytes | Image.Image, seed: int) -> Tensor:
        """Uint8 `(3, H, W)`. A file that the fast way cannot take is PIL's: it decodes it, or says what is wrong."""
        generator = torch.Generator()
        generator.manual_seed(seed)
        jpeg = read_header(data) if crop.fast and isinstance(data, bytes) else None
        if jpeg is not None and jpeg.width * jpeg.height <= self.max_image_pixels:
            box = crop.draw(jpeg.width, jpeg.height, generator)
            reduction = crop.reduction(box)
            pixels = jpeg.decode(reduction)
            if pixels is not None:
                return crop.finish(crop.cut_reduced(pixels, box, reduction), generator)
            generator.manual_seed(seed)
        image = data if isinstance(data, Image.Image) else decode_image(data, self.max_image_pixels)
        return crop(image, generator)

    @staticmethod
    def _guarded(make: Callable[[], Tensor]) -> Tensor:
        try:
            return make()
        except SkipSample:
            raise
        except Exception as error:  # whatever a user's transform raises costs one sample, counted
            raise SkipSample(TRANSFORM_FAILED, f"{type(error).__name__}: {error}") from error


def find_image(raw: Mapping[str, Any]) -> Any:
    """A sample's picture: bytes, an ImageFile, a PIL image, or None. Suffixes in any case."""
    by_suffix = {suffix.lower(): value for suffix, value in raw.items()}
    return next((by_suffix[suffix] for suffix in (IMAGE_ENTRY, *IMAGE_SUFFIXES) if suffix in by_suffix), None)


def encoded_image(raw: Mapping[str, Any]) -> bytes | Image.Image:
    """A sample's picture as its source has it. Raises SkipSample."""
    data = find_image(raw)
    if data is None:
        raise SkipSample(MISSING_IMAGE, f"none of {', '.join(IMAGE_SUFFIXES)}")
    return data.read() if isinstance(data, ImageFile) else data


def decode_image(data: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Encoded picture -> RGB. Raises SkipSample. Transparency is dropped, not composited, as OpenCLIP does it."""
    with open_image(data, max_image_pixels) as image:
        return image.convert("RGB")


@contextlib.contextmanager
def open_image(data: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Iterator[Image.Image]:
    """The picture, its size looked at and its pixels not yet read; what PIL raises while it is open is a SkipSample."""
    try:
        with _pil_limit(max_image_pixels):
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > max_image_pixels:
                raise SkipSample(
                    TOO_MANY_PIXELS, f"{width} x {height}, at most {max_image_pixels} (--max-image-pixels)"
                )
            yield image
    except SkipSample:
        raise
    except Image.DecompressionBombError as error:
        raise SkipSample(TOO_MANY_PIXELS, str(error)) from None
    except Exception as error:  # PIL's plugins raise almost anything on a corrupt file
        raise SkipSample(UNDECODABLE_IMAGE, f"{type(error).__name__}: {error}") from None


@contextlib.contextmanager
def _pil_limit(max_image_pixels: int) -> Iterator[None]:
    """PIL's own limit (an error at twice this) set to ours, so that it may be raised; no warnings, skips are counted.

    All warnings: leaving catch_warnings forgets which were shown, so that each odd file would print its own again.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_image_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def sample_seed(seed: int, epoch: int, pass_index: int, key: str) -> int:
    """Seed of one sample's randomness: the same for any number of workers and processes."""
    return zlib.crc32(f"{seed}/{epoch}/{pass_index}/{key}".encode()) | (seed & 0xFFFFFFFF) << 32


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's generators seeded, and put back afterwards: in the main process the model draws from them too.

    Not torch.manual_seed, which also queues a seeding of CUDA for each call before CUDA is there.
    """
    states = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    try:
        yield
    finally:
        torch.default_generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
