"""What all our models do with images, and VisionModel: the encoder alone, as the released checkpoints hold it.

Shapes: B batch, N image tokens, D width (core/__init__.py).
Source: docs/reference.md, "Released encoder checkpoints".
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_ov2.core import native
from open_clip_ov2.core.native import Images, NativeImages
from open_clip_ov2.core.positions import sincos_2d
from open_clip_ov2.core.rows import RaggedTokens
from open_clip_ov2.core.vit_fast import image_features

PositionTable = Literal["interpolate", "recompute"]


class ImageModel(nn.Module):
    """`visual`, OpenCLIP's VisionTransformer, maps images `(B, 3, H, W)` to `(pooled (B, D), patch tokens (B, N, D))`,
    tokens taken after the last block, class token dropped, final norm not applied (docs/reference.md: vit.py:786)."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual: Any = visual  # OpenCLIP's class, which this package does not know
        self.logit_bias = None  # OpenCLIP's checkpoint loader asks for it

    def position_table(self) -> Tensor:
        """The fixed table of ov2 models for this model's grid, `(1 + N, D)` float32."""
        old = self.visual.positional_embedding
        return sincos_2d(self.visual.grid_size, old.shape[1], device=old.device)

    @torch.no_grad()
    def reset_position_table(self) -> None:
        self.visual.positional_embedding.copy_(self.position_table())

    def encode_image_tokens(self, image: Images) -> Tensor | RaggedTokens:
        """All patch tokens, `(B, 3, H, W)` -> `(B, N, D)`, before the final norm; of NativeImages as many as each
        has."""
        return native.kept_tokens(self.visual, image) if isinstance(image, NativeImages) else self.visual(image)[1]

    def encode_image(self, image: Images, normalize: bool = False) -> Tensor:
        """Pooled features, `(B, D)`: final norm of the mean patch token, times the projection."""
        pooled_BD = native.pooled(self.visual, image) if isinstance(image, NativeImages) else self.visual(image)[0]
        return F.normalize(pooled_BD, dim=-1) if normalize else pooled_BD

    def features(self, image: Tensor, *, layer: int = -1, norm: bool = False, class_token: bool = False) -> Tensor:
        """Patch tokens of any layer, see `core.image_features`."""
        return image_features(self.visual, image, layer=layer, norm=norm, class_token=class_token)

    def image_outputs(self, image: Images) -> dict[str, Tensor]:
        """`{"image_features": (B, D), "image_embs": (B, N, D)}`."""
        if isinstance(image, NativeImages):
            raise ValueError("NativeImages differ in their tokens: take encode_image or encode_image_tokens")
        pooled_BD, tokens_BND = self.visual(image)
        return {"image_features": pooled_BD, "image_embs": tokens_BND}

    def set_grad_checkpointing(self, enable: bool = True, **options: Any) -> None:
        """`options` are those of OpenCLIP's encoder."""
        self.visual.set_grad_checkpointing(enable, **options)

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the encoder (LiT, arXiv 2111.07991) but for its last groups, as OpenCLIP counts them."""
        self.visual.lock(unlocked_groups=unlocked_groups, freeze_bn_stats=freeze_bn_stats)

    def no_weight_decay(self) -> set[str]:
        """Names that weight decay leaves alone; the reference decays kernels only."""
        return {"visual.positional_embedding", "visual.class_embedding"}


class VisionModel(ImageModel):
    """Images in, pooled features and patch tokens out; no decoder, no text encoder, no logit scale.

    `position_table` says how a stored table is fitted to another resolution: `interpolate` (bicubic, OpenCLIP's way),
    or `recompute` (the fixed table of ov2 models for the new grid, as training at that resolution would start). At the
    checkpoint's own resolution the stored table is taken as it is.
    """

    def __init__(self, visual: nn.Module, *, position_table: PositionTable = "interpolate") -> None:
        super().__init__(visual)
        if position_table not in get_args(PositionTable):
            known = ", ".join(get_args(PositionTable))
            raise ValueError(f"unknown position_table {position_table!r}; it is one of {known}")
        self.position_table_mode = position_table
        self.alone_by_layout = False  # whether it was taken for an encoder by its config's layout alone

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor]:
        """See `image_outputs`."""
        if image is None or text is not None:
            raise ValueError("a vision-only model takes images and nothing else")
        return self.image_outputs(image)
