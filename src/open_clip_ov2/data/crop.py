"""The training crop: a box drawn on the image's own size, resized, jittered, uint8.

The box is what torchvision's RandomResizedCrop draws, but from a generator that is passed in, so that no global
generator has to be saved and restored for each sample.
Shapes: C channels, H and W pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from open_clip_ov2.data.decode import EncodedImage, reduction_for

# A reduced image still has this times the target's pixels along each side of the crop. The resize's triangle filter
# then averages over four pixels or more and hides what the reduced DCT left out: measured on images of 512 px at
# 84 px, 39 dB PSNR at 2 and above, 36 at 1.25 to 1.5, 33 at 1.
MARGIN = 2.0
ATTEMPTS = 10  # torchvision's, before it takes the middle


class Box(NamedTuple):
    """In pixels of the image at full scale."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class RandomCrop:
    """`size` (height, width) in px; `scale`: share of the area, `ratio`: width / height, each drawn from a range.

    `jitter` changes the colors of the crop and draws from torch's default generator, as torchvision's transforms do.
    `fast`: JPEGs are decoded at a reduced scale where the crop stays MARGIN times as large as `size`, and resized by
    torch in uint8, within one level of PIL. Otherwise full scale and PIL. The boxes are the same.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    jitter: Callable[[Image.Image], Image.Image] | None = None
    fast: bool = True

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        """RGB image -> uint8 `(3, H, W)`. Without a generator, torch's default one is used."""
        box = self.draw(image.width, image.height, generator)
        return self._jittered(self._cut(image, box), generator)

    def decoded(self, encoded: EncodedImage, generator: torch.Generator) -> Tensor:
        """Encoded image -> uint8 `(3, H, W)`; decodes no more of a JPEG than the crop needs. Raises SkipSample."""
        box = self.draw(encoded.width, encoded.height, generator)
        reduction = reduction_for((box.height, box.width), (MARGIN * self.size[0], MARGIN * self.size[1]))
        pixels_HWC = encoded.rgb_reduced(reduction)
        if pixels_HWC is None:
            image_CHW = self._cut(encoded.rgb(), box)
        else:
            image_CHW = self._resized(_cut_reduced(pixels_HWC, box, reduction))
        return self._jittered(image_CHW, generator)

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

    def _cut(self, image: Image.Image, box: Box) -> Tensor:
        """The box of an image at full scale, uint8 `(3, H, W)`."""
        part = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        if self.fast:
            return self._resized(np.array(part))
        return _to_tensor(part.resize(self.size[::-1], Image.Resampling.BILINEAR))

    def _resized(self, pixels_HWC: npt.NDArray[np.uint8]) -> Tensor:
        images_BCHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]
        return F.interpolate(images_BCHW, self.size, mode="bilinear", antialias=True)[0]

    def _jittered(self, image_CHW: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.jitter is None:
            return image_CHW
        image = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
        if generator is None:
            return _to_tensor(self.jitter(image))
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(generator.get_state())
        try:
            return _to_tensor(self.jitter(image))
        finally:
            torch.default_generator.set_state(before)


@functools.cache
def _logs(ratio: tuple[float, float]) -> tuple[float, float]:
    """In float32, as torchvision has them."""
    low, high = torch.log(torch.tensor(ratio)).tolist()
    return low, high


def _cut_reduced(pixels_HWC: npt.NDArray[np.uint8], box: Box, reduction: int) -> npt.NDArray[np.uint8]:
    """The box, to the nearest pixel, of an image that was decoded at 1 / `reduction` of its size."""

    def span(start: int, length: int, size: int) -> slice:
        first = min(round(start / reduction), size - 1)
        return slice(first, min(max(round((start + length) / reduction), first + 1), size))

    return pixels_HWC[span(box.top, box.height, pixels_HWC.shape[0]), span(box.left, box.width, pixels_HWC.shape[1])]


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
