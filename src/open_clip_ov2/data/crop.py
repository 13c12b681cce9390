"""The training crop: a box drawn on the image's own size, resized, jittered, uint8.

Shapes: C channels, H and W pixels.
"""

from __future__ import annotations

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


class Box(NamedTuple):
    """In pixels of the upright image at full scale."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class RandomCrop:
    """`size`: (height, width) in px. `draw` gives a box for an image's width and height; `jitter` changes its colors.

    Both draw from torch's default generator, as torchvision's transforms do. `interpolation`: bilinear, bicubic, or
    random, which draws one of the two for each image.
    `fast`: JPEGs are decoded at a reduced scale where the crop stays MARGIN times as large as `size`, and resized by
    torch in uint8, within one level of PIL. Otherwise full scale and PIL. The boxes are the same.
    """

    size: tuple[int, int]
    draw: Callable[[int, int], Box]
    jitter: Callable[[Image.Image], Image.Image] | None = None
    fast: bool = True
    interpolation: str = "bilinear"

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> uint8 `(3, H, W)`."""
        box = self.draw(image.width, image.height)
        return self._jittered(self._cut(image, box, self._filter()))

    def decoded(self, encoded: EncodedImage) -> Tensor:
        """Encoded image -> uint8 `(3, H, W)`; decodes no more of a JPEG than the crop needs. Raises SkipSample."""
        box, resize_filter = self.draw(*encoded.size), self._filter()
        reduction = reduction_for((box.height, box.width), (MARGIN * self.size[0], MARGIN * self.size[1]))
        pixels_HWC = encoded.rgb_reduced(reduction)
        if pixels_HWC is None:
            return self._jittered(self._cut(encoded.rgb(), box, resize_filter))
        return self._jittered(self._resized(_cut_reduced(pixels_HWC, box, reduction), resize_filter))

    def _filter(self) -> str:
        """The name of this image's interpolation."""
        if self.interpolation != "random":
            return self.interpolation
        return "bilinear" if torch.rand(()) < 0.5 else "bicubic"

    def _cut(self, image: Image.Image, box: Box, resize_filter: str) -> Tensor:
        """The box of an image at full scale, uint8 `(3, H, W)`."""
        part = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        if self.fast:
            return self._resized(np.array(part), resize_filter)
        return _to_tensor(part.resize(self.size[::-1], Image.Resampling[resize_filter.upper()]))

    def _resized(self, pixels_HWC: npt.NDArray[np.uint8], resize_filter: str) -> Tensor:
        images_BCHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]
        return F.interpolate(images_BCHW, self.size, mode=resize_filter, antialias=True)[0]

    def _jittered(self, image_CHW: Tensor) -> Tensor:
        if self.jitter is None:
            return image_CHW
        return _to_tensor(self.jitter(Image.fromarray(image_CHW.permute(1, 2, 0).numpy())))


def _cut_reduced(pixels_HWC: npt.NDArray[np.uint8], box: Box, reduction: int) -> npt.NDArray[np.uint8]:
    """The box, to the nearest pixel, of an image that was decoded at 1 / `reduction` of its size."""

    def span(start: int, length: int, size: int) -> slice:
        first = min(round(start / reduction), size - 1)
        return slice(first, min(max(round((start + length) / reduction), first + 1), size))

    return pixels_HWC[span(box.top, box.height, pixels_HWC.shape[0]), span(box.left, box.width, pixels_HWC.shape[1])]


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
