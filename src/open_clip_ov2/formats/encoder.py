"""The encoder as plain sizes and tensors, from which every export starts.

Shapes: N patches, D width, F MLP width, P patch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.errors import UserError

EPS = 1e-6  # flax's LayerNorm, as the reference uses it
# docs/reference.md, encoder variants: (heads, MLP width) by width, for what leaves them out.
PUBLISHED_SIZES = {
    192: (3, 768), 384: (6, 1536), 768: (12, 3072), 1024: (16, 4096), 1152: (16, 4304), 1280: (16, 5120),
    1408: (16, 6144),
}  # fmt: skip


def mlp_ratio(width: int, mlp_width: int) -> float:
    """A ratio from which OpenCLIP and timm compute exactly `mlp_width`, as `int(width * ratio)`."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else ratio + 0.5 / width


@dataclass(frozen=True)
class Preprocessing:
    """Resize the short side to the image size, crop the center, then subtract `mean` and divide by `std`.

    With `resize_mode` "squash", both sides are resized to the image size and nothing is cropped.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    resize_mode: str = "shortest"

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> Preprocessing:
        """From OpenCLIP's `preprocess_cfg`. Raises UserError for settings that other libraries do not have."""
        if cfg["resize_mode"] not in ("shortest", "squash"):
            raise UserError(f"resize_mode {cfg['resize_mode']!r}: `ov2 export` supports shortest and squash only")
        interpolation = "bilinear" if cfg["interpolation"] == "bilinear" else "bicubic"  # as random is in evaluation
        return cls(tuple(cfg["mean"]), tuple(cfg["std"]), interpolation, cfg["resize_mode"])


@dataclass(frozen=True)
class Encoder:
    """Sizes in channels and pixels. `state` is float32 on the CPU under the released keys (no `visual.` in front):
    class_embedding (D,), positional_embedding (1 + N, D), conv1.weight (D, 3, P, P), transformer.resblocks.i.*,
    ln_post.*, proj (D, output width).
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int
    image_size: tuple[int, int]
    preprocessing: Preprocessing
    state: Mapping[str, Tensor]

    @property
    def num_tokens(self) -> int:
        """Patch tokens, N."""
        height, width = self.image_size
        return (height // self.patch_size) * (width // self.patch_size)

    @property
    def output_width(self) -> int:
        """Of the pooled output."""
        return self.state["proj"].shape[1]

    @property
    def config_size(self) -> int | list[int]:
        """As configs have it: the side of a square, or height and width."""
        height, width = self.image_size
        return height if height == width else [height, width]

    @classmethod
    def of(cls, visual: Any, preprocess_cfg: Mapping[str, Any]) -> Encoder:
        """From the VisionTransformer of an ov2 model or a released encoder. Raises UserError for unusual sizes."""
        block = visual.transformer.resblocks[0]
        rows, columns = visual.patch_size
        if rows != columns:
            raise UserError(f"patches of {rows} x {columns} pixels: `ov2 export` supports square patches only")
        for side in visual.image_size:
            if side % rows:
                raise UserError(f"image size {side} is not a multiple of the patch size, {rows} (--image-size)")
        state = {key: value.detach().to("cpu", torch.float32) for key, value in visual.state_dict().items()}
        return cls(
            width=state["class_embedding"].shape[0],
            layers=len(visual.transformer.resblocks),
            heads=block.attn.num_heads,
            mlp_width=block.mlp.c_fc.out_features,
            patch_size=rows,
            image_size=(int(visual.image_size[0]), int(visual.image_size[1])),
            preprocessing=Preprocessing.of(preprocess_cfg),
            state=state,
        )
