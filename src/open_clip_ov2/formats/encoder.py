"""The encoder as plain sizes and tensors: what every export starts from.

Shapes: N patches, D width, F MLP width, P patch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from open_clip_ov2.errors import UserError

EPS = 1e-6  # flax's LayerNorm, as the reference uses it


def mlp_ratio(width: int, mlp_width: int) -> float:
    """The ratio that OpenCLIP and timm turn back into `mlp_width` by `int(width * ratio)`."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else ratio + 0.5 / width


@dataclass(frozen=True)
class Preprocessing:
    """Short side to the image size (bilinear unless said otherwise), centre crop, then mean and standard deviation."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    resize_mode: str = "shortest"

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> Preprocessing:
        """From OpenCLIP's `preprocess_cfg`. Raises UserError for what other libraries do not have."""
        if cfg["resize_mode"] not in ("shortest", "squash"):
            raise UserError(f"resize_mode {cfg['resize_mode']!r} has no counterpart in the formats of ov2 export")
        if cfg["interpolation"] not in ("bilinear", "bicubic"):
            raise UserError(f"interpolation {cfg['interpolation']!r} has no counterpart in the formats of ov2 export")
        return cls(tuple(cfg["mean"]), tuple(cfg["std"]), str(cfg["interpolation"]), cfg["resize_mode"])


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
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Patch tokens, N."""
        return self.grid[0] * self.grid[1]

    @property
    def output_width(self) -> int:
        """Of the pooled output."""
        return self.state["proj"].shape[1]

    @property
    def square_size(self) -> int:
        """The side, for formats that know squares alone. Raises UserError."""
        if self.image_size[0] != self.image_size[1]:
            raise UserError(f"this format knows square images alone, and the encoder's are {self.image_size}")
        return self.image_size[0]

    @classmethod
    def of(cls, visual: Any, preprocess_cfg: Mapping[str, Any]) -> Encoder:
        """From OpenCLIP's VisionTransformer. Raises UserError for any other architecture than the family's."""
        block = visual.transformer.resblocks[0] if hasattr(visual, "transformer") else None
        checks = {
            "no norm before the blocks": isinstance(getattr(visual, "ln_pre", None), nn.Identity),
            "mean pooling": getattr(visual, "pool_type", "") == "avg" and getattr(visual, "attn_pool", 1) is None,
            "the final norm after pooling": getattr(visual, "final_ln_after_pool", False),
            "exact GELU": block is not None and _is_exact_gelu(block.mlp.gelu),
            "no layer scale": block is not None and isinstance(block.ls_1, nn.Identity),
            "LayerNorm's eps 1e-6": block is not None and block.ln_1.eps == EPS,
        }
        lacking = [name for name, there in checks.items() if not there]
        if lacking:
            raise UserError(f"ov2 export knows the family's encoders, which have {', '.join(lacking)}")
        assert block is not None
        rows, columns = visual.patch_size
        if rows != columns:
            raise UserError(f"patches of {rows} x {columns} pixels have no counterpart in the formats of ov2 export")
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


def _is_exact_gelu(module: nn.Module) -> bool:
    return isinstance(module, nn.GELU) and module.approximate == "none"
