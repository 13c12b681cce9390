"""One raw sample to image tensor and caption, each with its own seed.

Shapes: C channels, H and W pixels.
"""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from open_clip_ov2.data.captions import CaptionKey, all_captions, choose_caption, with_prompt
from open_clip_ov2.data.crop import RandomCrop, TokenBudget
from open_clip_ov2.data.decode import MAX_IMAGE_PIXELS, EncodedImage, decode_image
from open_clip_ov2.data.skips import MISSING_IMAGE, TOO_MANY_PIXELS, TRANSFORM_FAILED, SkipSample, missing

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
SUFFIXES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
IMAGE_ENTRY = "__image__"  # where a source that reads no tar puts an ImageFile or a PIL image


@dataclass(frozen=True)
class ImageFile:
    """An image file that is read only when it is used: the first of `candidates` that can be opened."""

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
    """Makes image tensor and caption of a raw sample. `transform` maps a PIL image in RGB to a tensor `(C, H, W)`.

    A `RandomCrop` gets the encoded image instead, so that no more of a JPEG is decoded than the crop needs. With
    `prompt_keys` the caption is prompt, PROMPT_END and caption.
    """

    transform: Callable[[Image.Image], Tensor]
    caption_keys: tuple[CaptionKey, ...]
    max_image_pixels: int = MAX_IMAGE_PIXELS
    prompt_keys: tuple[CaptionKey, ...] = ()

    def train(self, raw: Mapping[str, Any], seed: int) -> tuple[Tensor, str]:
        """Image `(C, H, W)` and caption; crop and caption are drawn from `seed`. Raises SkipSample.

        The caption comes first because looking for it costs least.
        """
        rng = random.Random(seed)
        caption, seed = choose_caption(raw, self.caption_keys, rng), rng.getrandbits(63)
        if self.prompt_keys:
            caption = with_prompt(raw, caption, self.prompt_keys, rng)
        return self.pixels(raw, seed), caption

    def evaluate(self, raw: Mapping[str, Any]) -> tuple[Tensor, str]:
        """Image `(C, H, W)` and the first caption (and prompt), "" without `caption_keys`. Raises SkipSample."""
        caption = all_captions(raw, self.caption_keys)[0] if self.caption_keys else ""
        if self.prompt_keys:
            caption = with_prompt(raw, caption, self.prompt_keys, None)
        return self.pixels(raw), caption  # a transform that draws must neither vary nor disturb the model

    def pixels(self, raw: Mapping[str, Any], seed: int = 0) -> Tensor:
        """Image `(C, H, W)`; a transform that draws numbers draws them from `seed`. Raises SkipSample."""
        crop = self.transform
        try:
            if isinstance(crop, RandomCrop) and isinstance(data := encoded_image(raw), bytes):
                with torch_seeded(seed):
                    return crop.decoded(EncodedImage(data, self.max_image_pixels, fast=crop.fast))
            image = rgb_image(raw, self.max_image_pixels)
            check_resized_size(self.transform, image, self.max_image_pixels)
            with seeded(seed):
                return self.transform(image)
        except SkipSample:
            raise
        except Exception as error:  # whatever a user's transform raises costs one sample, counted
            raise SkipSample(TRANSFORM_FAILED, f"{type(error).__name__}: {error}") from error


def check_resized_size(transform: Any, image: Image.Image, max_image_pixels: int) -> None:
    """Raises SkipSample for an image that would have more pixels than the limit once its short side is resized.

    The center is cut after the resize, so a line of 8,000 x 1 px would be 1.8 million px long at 224 px. OpenCLIP's
    evaluation transforms begin with a resize to a short side (an int) or to fill a size `(height, width)`.
    """
    first = next(iter(getattr(transform, "transforms", ())), None)
    size = getattr(first, "size", None)
    stretches = type(first).__name__ == "Resize" and not isinstance(size, int)
    if size is None or stretches or isinstance(size, TokenBudget) or getattr(first, "longest", False):
        return  # the size after such a resize does not depend on the image
    height, width = (size, size) if isinstance(size, int) else size
    scale = max(height / image.height, width / image.width)
    wide, high = round(image.width * scale), round(image.height * scale)
    if wide * high > max_image_pixels:
        what = f"{image.width} x {image.height} px would be resized to {wide} x {high} px"
        raise SkipSample(TOO_MANY_PIXELS, f"{what}, at most {max_image_pixels} pixels (--max-image-pixels)")


def encoded_image(raw: Mapping[str, Any]) -> bytes | Image.Image:
    """A sample's image, not yet decoded if it is a file. Suffixes in any case. Raises SkipSample."""
    by_suffix = {suffix.lower(): value for suffix, value in raw.items()}
    for suffix in (IMAGE_ENTRY, *IMAGE_SUFFIXES):
        if suffix in by_suffix:
            image: bytes | Image.Image | ImageFile = by_suffix[suffix]
            return image.read() if isinstance(image, ImageFile) else image
    raise missing(MISSING_IMAGE, raw, IMAGE_SUFFIXES)


def rgb_image(raw: Mapping[str, Any], max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """A sample's whole image. Raises SkipSample."""
    data = encoded_image(raw)
    return data if isinstance(data, Image.Image) else decode_image(data, max_image_pixels)


def sample_seed(seed: int, epoch: int, pass_index: int, key: str) -> int:
    """Seed of one sample's crop and caption: the same for any number of workers and processes."""
    # surrogatepass: a tar's names need not be UTF-8
    data = f"{seed}/{epoch}/{pass_index}/{key}".encode("utf-8", "surrogatepass")
    return zlib.crc32(data) | (seed & 0xFFFFFFFF) << 32


@contextlib.contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator of the CPU and restore it afterwards: in the main process the model draws from it too.

    Not by torch.manual_seed, which also queues a seeding of CUDA at each call before CUDA is initialized.
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The same for Python's and NumPy's generators too, for transforms and tokenizers that may draw from any."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    try:
        with torch_seeded(seed):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
