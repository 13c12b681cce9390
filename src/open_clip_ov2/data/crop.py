"""The training crop: a box drawn on the image's own size, resized, jittered, uint8; and the sizes of images that keep
their shapes.

Shapes: C channels, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from open_clip_ov2.core.native import Images, stacked
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
class TokenBudget:
    """At most `most` patches of `patch` x `patch` px for each image; an image gets at least half of them."""

    most: int
    patch: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) for an image of these sides: of the grids within the budget the one nearest to the grid that
        would have both the image's ratio and all of the budget, by the squared logarithms of what each side lacks."""
        rows = math.sqrt(self.most * height / width)
        columns = self.most / rows
        near = [(self._beside(side), side) for side in (rows, columns)]
        found = [(r, min(c, self.most // r)) for r in near[0][0] for c in near[1][0]]
        found += [(min(r, self.most // c), c) for r in near[0][0] for c in near[1][0]]
        return min(found, key=lambda g: (math.log(g[0] / rows) ** 2 + math.log(g[1] / columns) ** 2, -g[0] * g[1], g))

    def _beside(self, side: float) -> set[int]:
        return {min(max(1, whole), self.most) for whole in (math.floor(side), math.ceil(side))}

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in px."""
        rows, columns = self.grid(height, width)
        return rows * self.patch, columns * self.patch


@dataclass(frozen=True)
class RandomCrop:
    """`size`: (height, width) in px, or a budget for boxes of any shape. `draw` gives a box for an image's width and
    height; `jitter` changes its colors.

    Both draw from torch's default generator, as torchvision's transforms do. `interpolation`: bilinear, bicubic, or
    random, which draws one of the two for each image.
    `fast`: JPEGs are decoded at a reduced scale where the crop stays MARGIN times as large as `size`, and resized by
    torch in uint8, within one level of PIL. Otherwise full scale and PIL. The boxes are the same.
    """

    size: tuple[int, int] | TokenBudget
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
        height, width = size = self._size(box)
        reduction = reduction_for((box.height, box.width), (MARGIN * height, MARGIN * width))
        pixels_HWC = encoded.rgb_reduced(reduction)
        if pixels_HWC is None:
            return self._jittered(self._cut(encoded.rgb(), box, resize_filter))
        return self._jittered(self._resized(_cut_reduced(pixels_HWC, box, reduction), size, resize_filter))

    def _size(self, box: Box) -> tuple[int, int]:
        """(height, width) in px that a box becomes."""
        return self.size.size(box.height, box.width) if isinstance(self.size, TokenBudget) else self.size

    def _filter(self) -> str:
        """The name of this image's interpolation."""
        if self.interpolation != "random":
            return self.interpolation
        return "bilinear" if torch.rand(()) < 0.5 else "bicubic"

    def _cut(self, image: Image.Image, box: Box, resize_filter: str) -> Tensor:
        """The box of an image at full scale, uint8 `(3, H, W)`."""
        part = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        size = self._size(box)
        if self.fast:
            return self._resized(np.array(part), size, resize_filter)
        return _to_tensor(part.resize(size[::-1], Image.Resampling[resize_filter.upper()]))

    def _resized(self, pixels_HWC: npt.NDArray[np.uint8], size: tuple[int, int], resize_filter: str) -> Tensor:
        images_BCHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]
        return F.interpolate(images_BCHW, size, mode=resize_filter, antialias=True)[0]

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


@dataclass(frozen=True)
class ToBudget:
    """PIL image -> the same image at the size that its budget allows, as the first step of a transform."""

    size: TokenBudget
    interpolation: str

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size.size(image.height, image.width)
        return image.convert("RGB").resize((width, height), Image.Resampling[self.interpolation.upper()])


def budget_of(transform: Any) -> TokenBudget | None:
    """Of a transform that keeps the shape of images; None for one that gives all of them the same shape."""
    size = getattr(next(iter(getattr(transform, "transforms", ())), transform), "size", None)
    return size if isinstance(size, TokenBudget) else None


def as_batch(images: Sequence[Tensor], transform: Any) -> Images:
    """A batch of what a transform has made of images, `(C, H, W)` each."""
    budget = budget_of(transform)
    return stacked(images, budget.patch if budget else None)
