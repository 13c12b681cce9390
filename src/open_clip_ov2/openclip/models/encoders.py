"""Encoders that are not ours, as an evaluation reads them: patch tokens of any ViT, and `pixels:16`, gray pixels in
place of an encoder, the floor under all that is learned.

Shapes: B batch, N patches, D width (core/__init__.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from open_clip_ov2.core import image_features
from open_clip_ov2.errors import UserError

NAME = "pixels:"
LARGEST = 256  # px; larger images are no small features


@dataclass(frozen=True)
class GrayPixels:
    """PIL image -> `(1, side, side)` float32, 0 to 1: the whole image, squeezed into a square of `side` px."""

    side: int

    def __call__(self, image: Any) -> Tensor:
        small = image.convert("L").resize((self.side, self.side), Image.Resampling.BOX)
        return torch.from_numpy(np.array(small, dtype=np.float32))[None] / 255


class Pixels(nn.Module):
    """Features are the pixels less their mean, so that cosine similarity is their correlation."""

    visual = None

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """`(B, 1, side, side)` -> `(B, D)`."""
        pixels_BD = image.flatten(1)
        pixels_BD = pixels_BD - pixels_BD.mean(dim=1, keepdim=True)
        return nn.functional.normalize(pixels_BD, dim=-1) if normalize else pixels_BD


def patch_tokens(visual: Any, images: Tensor, layer: int, name: str) -> Tensor:
    """`(B, 3, H, W)` -> `(B, N, D)` after block `layer`, counted from the end, without norm; of timm's encoders that
    are no ViTs the places of a feature map. Raises UserError for an encoder that has neither, with the model's name."""
    if hasattr(visual, "transformer"):
        return image_features(visual, images, layer=layer)
    if not hasattr(getattr(visual, "trunk", None), "forward_intermediates"):
        raise UserError(f"{name}: has no patch tokens; the ViTs of OpenCLIP and the encoders of timm have")
    # Places by rows and columns: the layout that all of timm's encoders know.
    (found_BDHW,) = visual.trunk.forward_intermediates(
        images, indices=[layer], norm=False, intermediates_only=True, output_fmt="NCHW"
    )
    return found_BDHW.flatten(2).mT


def pixel_preprocess(source: str) -> GrayPixels | None:
    """The preprocessing of `pixels:SIDE`; None for any other name. Raises UserError."""
    if not source.startswith(NAME):
        return None
    side = source.removeprefix(NAME)
    if not side.isdecimal() or not 1 <= int(side) <= LARGEST:
        raise UserError(f"{source!r}: expected pixels:SIDE, SIDE in px from 1 to {LARGEST}")
    return GrayPixels(int(side))
