"""Matrix products in float8 through torchao: activations and weights in e4m3, gradients in e5m2 (arXiv 2209.05433),
each tensor with a scale that is computed from its largest entry."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from open_clip_ov2.core.vit_fast import project_by
from open_clip_ov2.errors import UserError

CAPABILITY = (8, 9)  # of the first NVIDIA GPUs with such units: Ada, Hopper


def use_float8(model: Any, how: str, device: torch.device) -> None:
    """In the blocks of the vision tower, in place. Parameters and their names stay as they are, in float32. `how`:
    "on", or "emulated", which rounds to float8 and multiplies in a wider type, on any device. Raises UserError without
    torchao, and for a device without such units."""
    if how == "on" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY):
        raise UserError("--fp8 on: needs an NVIDIA GPU from Ada or Hopper on; `--fp8 emulated` runs anywhere, slowly")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError("--fp8 needs torchao: pip install 'open_clip_ov2[fp8]'") from None
    convert: Callable[[nn.Module], nn.Module] = partial(
        convert_to_float8_training, config=Float8LinearConfig(emulate=how == "emulated")
    )
    for block in model.visual.transformer.resblocks:
        convert(block)
        if getattr(block.attn, "is_fused", False):
            project_by(block.attn, convert)
