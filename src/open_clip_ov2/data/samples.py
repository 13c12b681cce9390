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
from open_clip_ov2.data.skips import (
    MISSING_IMAGE,
    TOO_MANY_PIXELS,
    TRANSFORM_FAILED,
    UNDECODABLE_IMAGE,
    SkipSample,
)

MAX_IMAGE_PIXELS = 89_478_485  # where PIL starts to warn of a decompression bomb
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Decoder:
    """What turns a raw sample into a usable one. `transform` maps a PIL image to a tensor `(C, H, W)`."""

    transform: Callable[[Image.Image], Tensor]
    caption_keys: tuple[CaptionKey, ...]
    max_image_pixels: int = MAX_IMAGE_PIXELS

    def train(self, raw: Mapping[str, Any], seed: int) -> tuple[Tensor, str]:
        """Caption and crop drawn from `seed`, which is a function of run, epoch, pass and key."""
        rng = random.Random(seed)
        caption = choose_caption(raw, self.caption_keys, rng)
        image = self.image(raw)
        with seeded(rng.getrandbits(63)):
            return self._transformed(image), caption

    def evaluate(self, raw: Mapping[str, Any]) -> tuple[Tensor, str]:
        """The first caption there is: evaluation draws nothing."""
        caption = all_captions(raw, self.caption_keys)[0]
        return self._transformed(self.image(raw)), caption

    def image(self, raw: Mapping[str, Any]) -> Image.Image:
        """The picture of a sample, RGB. Raises SkipSample."""
        data = find_image(raw)
        if data is None:
            raise SkipSample(MISSING_IMAGE, f"none of {', '.join(IMAGE_SUFFIXES)}")
        return data if isinstance(data, Image.Image) else decode_image(data, self.max_image_pixels)

    def _transformed(self, image: Image.Image) -> Tensor:
        try:
            return self.transform(image)
        except Exception as error:  # whatever a user's transform raises costs one sample, counted
            raise SkipSample(TRANSFORM_FAILED, f"{type(error).__name__}: {error}") from error


def find_image(raw: Mapping[str, Any]) -> Any:
    """Encoded picture of a sample, or None."""
    return next((raw[suffix] for suffix in IMAGE_SUFFIXES if suffix in raw), None)


def decode_image(data: bytes, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Encoded picture -> RGB, its size looked at before its pixels. Raises SkipSample."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > max_image_pixels:
                raise SkipSample(TOO_MANY_PIXELS, f"{width} x {height}")
            return image.convert("RGB")
    except SkipSample:
        raise
    except Image.DecompressionBombError as error:
        raise SkipSample(TOO_MANY_PIXELS, str(error)) from None
    except Exception as error:  # PIL's plugins raise almost anything on a corrupt file
        raise SkipSample(UNDECODABLE_IMAGE, f"{type(error).__name__}: {error}") from None


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


def group_of(raw: Mapping[str, Any], key: CaptionKey | None) -> str:
    """The text under `key`, or "" where there is none."""
    if key is None:
        return ""
    try:
        return all_captions(raw, (key,))[0]
    except SkipSample:
        return ""
