"""Patch tokens of any layer: what multimodal models take from a vision encoder.

Shapes: B batch, N image tokens, D width (core/__init__.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def image_features(
    visual: Any, images: Tensor, *, layer: int = -1, norm: bool = False, class_token: bool = False
) -> Tensor:
    """Tokens after block `layer` of an OpenCLIP VisionTransformer, `(B, 3, H, W)` -> `(B, N, D)`.

    `layer` counts blocks from 0, or from the end: -1 is the last block, what the caption loss trains and the decoder
    gets; -2 the penultimate one, which LLaVA takes from CLIP. `norm` applies the encoder's final norm.
    `class_token` puts the class token in front, `(B, 1 + N, D)`. Later blocks are not computed.
    Raises ValueError for a layer that is not there.
    """
    blocks = len(visual.transformer.resblocks)
    if not -blocks <= layer < blocks:
        raise ValueError(f"layer {layer}: this encoder has {blocks} blocks, 0 to {blocks - 1}, or -{blocks} to -1")
    out = visual.forward_intermediates(
        images,
        indices=[layer % blocks],
        stop_early=True,
        normalize_intermediates=norm,
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=class_token,
    )
    tokens_BND = out["image_intermediates"][0]
    return torch.cat([out["image_intermediates_prefix"][0], tokens_BND], dim=1) if class_token else tokens_BND
