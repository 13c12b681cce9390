"""The training crop: a box drawn on the picture's own size, resized, jittered, uint8.

Draws what torchvision's RandomResizedCrop, RandomApply(ColorJitter) and RandomGrayscale draw, in their order, but from
a generator that is handed in: a sample needs no global generator saved and put back.
Shapes: C channels, H and W pixels.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance
from torch import Tensor

from open_clip_ov2.data.jpeg import reduction_for

# A reduced picture still has this times the target's pixels along each side of the crop. The resize's triangle filter
# then averages over four pixels or more and hides what the reduced DCT left out: measured on pictures of 512 px at
# 84 px, 39 dB PSNR at 2 and above, 36 at 1.25 to 1.5, 33 at 1.
MARGIN = 2.0
ATTEMPTS = 10  # torchvision's, before it takes the middle


class Box(NamedTuple):
    """In pixels of the picture at full scale."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Jitter:
    """`ranges` of the factors of brightness, contrast, saturation and hue (turns), None: not changed; `probability` of
    all four together, and that of grey. 0 draws nothing.
    """

    ranges: tuple[tuple[float, float] | None, ...]
    probability: float
    grey_probability: float


@dataclass(frozen=True)
class RandomCrop:
    """`size` (height, width) in px; `scale`: share of the area, `ratio`: width / height, each drawn from a range.

    `fast`: JPEGs at a reduced scale where the crop stays MARGIN times as large as `size`, and torch's uint8 resize,
    which is within one level of PIL's. Otherwise full scale and PIL. The boxes are the same.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    jitter: Jitter | None = None
    fast: bool = True

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        """RGB picture -> uint8 `(3, H, W)`. None draws from torch's default generator."""
        box = self.draw(image.width, image.height, generator)
        return self.finish(self.cut(image, box), generator)

    def draw(self, width: int, height: int, generator: torch.Generator | None) -> Box:
        low, high = _logs(self.ratio)
        for _ in range(ATTEMPTS):
            area = width * height * torch.empty(1).uniform_(*self.scale, generator=generator).item()
            ratio = torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
            across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < across <= width and 0 < down <= height:
                top = int(torch.randint(0, height - down + 1, (1,), generator=generator))
                left = int(torch.randint(0, width - across + 1, (1,), generator=generator))
                return Box(left, top, across, down)
        return self._middle(width, height)

    def _middle(self, width: int, height: int) -> Box:
        """As much as the range of ratios allows."""
        low, high = min(self.ratio), max(self.ratio)
        across, down = width, height
        if width / height < low:
            down = round(width / low)
        elif width / height > high:
            across = round(height * high)
        return Box((width - across) // 2, (height - down) // 2, across, down)

    def reduction(self, box: Box) -> int:
        """By how much a JPEG may be reduced before it is cut."""
        return reduction_for((box.height, box.width), (MARGIN * self.size[0], MARGIN * self.size[1]))

    def cut(self, image: Image.Image, box: Box) -> Tensor:
        """The box of a picture at full scale, uint8 `(3, H, W)`."""
        part = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        if self.fast:
            return self._resized(torch.from_numpy(np.array(part)))
        return _to_tensor(part.resize(self.size[::-1], Image.Resampling.BILINEAR))

    def cut_reduced(self, pixels: Any, box: Box, reduction: int) -> Tensor:
        """The box, to the nearest pixel, of an array `(ceil(height / reduction), ceil(width / reduction), 3)`."""
        left, right = _span(box.left, box.width, reduction, pixels.shape[1])
        top, bottom = _span(box.top, box.height, reduction, pixels.shape[0])
        return self._resized(torch.from_numpy(pixels[top:bottom, left:right]))

    def _resized(self, pixels_HWC: Tensor) -> Tensor:
        images_BCHW = pixels_HWC.permute(2, 0, 1)[None]
        return F.interpolate(images_BCHW, self.size, mode="bilinear", antialias=True)[0]

    def finish(self, image_CHW: Tensor, generator: torch.Generator | None) -> Tensor:
        """Colour jitter and grey."""
        return image_CHW if self.jitter is None else _jittered(image_CHW, self.jitter, generator)


@functools.cache
def _logs(ratio: tuple[float, float]) -> tuple[float, float]:
    """In float32, as torchvision has them."""
    low, high = torch.log(torch.tensor(ratio)).tolist()
    return low, high


def _span(start: int, length: int, reduction: int, size: int) -> tuple[int, int]:
    first = min(round(start / reduction), size - 1)
    return first, min(max(round((start + length) / reduction), first + 1), size)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _jittered(image_CHW: Tensor, jitter: Jitter, generator: torch.Generator | None) -> Tensor:
    steps = _drawn_factors(jitter, generator)
    grey = jitter.grey_probability > 0 and bool(torch.rand(1, generator=generator) < jitter.grey_probability)
    if not steps and not grey:
        return image_CHW
    image = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
    for which, factor in steps:
        image = _ADJUST[which](image, factor)
    return _to_tensor(image.convert("L").convert("RGB") if grey else image)


def _drawn_factors(jitter: Jitter, generator: torch.Generator | None) -> list[tuple[int, float]]:
    """(which, factor) in the order drawn. Probabilities are compared in float32, as torchvision does."""
    if jitter.probability <= 0 or jitter.probability < torch.rand(1, generator=generator):
        return []
    order = torch.randperm(4, generator=generator).tolist()
    factors = [r and torch.empty(1).uniform_(*r, generator=generator).item() for r in jitter.ranges]
    return [(which, factor) for which in order if (factor := factors[which]) is not None]


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    steps = int(turns * 255) % 256  # torchvision's, of a circle that has 256
    shifted = hue.point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (shifted, saturation, value)).convert("RGB")


_ADJUST = (
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    _shift_hue,
)
