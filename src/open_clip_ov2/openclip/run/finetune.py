"""Changes to a model before it trains: parameters frozen by name; of the vision tower, LoRA (arXiv 2106.09685) through
peft, and matrix products in float8 through torchao: activations and weights in e4m3, gradients in e5m2 (arXiv
2209.05433), each tensor with a scale that is computed from its largest entry.

Shapes: B batch, S tokens, D width.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from open_clip_ov2.core.attention import scaled_dot_product
from open_clip_ov2.core.vit_fast import project_by
from open_clip_ov2.errors import UserError, from_extra
from open_clip_ov2.train.checkpoint import weights_content
from open_clip_ov2.train.ema import WeightAverage

logger = logging.getLogger("open_clip_ov2")

ADAPTER = "default"  # peft's name for the only one
FLOAT8_CAPABILITY = (8, 9)  # of the first NVIDIA GPUs with units for float8: Ada, Hopper
ADAPTED = r"transformer\.resblocks\.\d+\.(attn\.(in|out)_proj|mlp\.(c_fc|c_proj))"  # all matrices of all blocks


def matching(flag: str, patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """The names that any pattern matches whole (`*` also matches dots). Raises UserError for a pattern without any."""
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise UserError(f"{flag} {pattern}: matches no parameter; their names are like {', '.join(names[:3])}")
        found |= hits
    return found


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Raises UserError for a pattern that matches nothing, and if nothing is left to train."""
    parameters = dict(model.named_parameters())
    for name in matching("--freeze", patterns, list(parameters)):
        parameters[name].requires_grad_(False)
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if not trained:
        raise UserError("--freeze: no parameter is left to train")
    if patterns:
        logger.info("--freeze: %d of %d parameter tensors are trained", len(trained), len(parameters))


class _LinearAttention(nn.Module):
    """nn.MultiheadAttention whose input projection is a module of its own, as peft needs it."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.in_proj = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, device="meta")
        self.in_proj.weight, self.in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj, self.num_heads = attention.out_proj, attention.num_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Queries `(B, S, D)`, and keys that are the values, `(B, S', D)` -> `(B, S, D)`, None."""
        parts = self.in_proj(query).chunk(3, dim=-1)
        if query is not key:
            parts = (parts[0], *self.in_proj(key).chunk(3, dim=-1)[1:])
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        return self.out_proj(scaled_dot_product(q, k, v).transpose(1, 2).flatten(2)), None


def add_lora(model: Any, rank: int, alpha: float | None) -> None:
    """Freeze the vision tower, and add `alpha / rank * B A` to each matrix of its blocks; the rest trains as before. A
    matrix computes what it did before the first step, since B begins as zero. Raises UserError for a tower that is not
    OpenCLIP's own ViT, and without peft."""
    blocks = getattr(getattr(model.visual, "transformer", None), "resblocks", None)
    if blocks is None:
        raise UserError("--lora-rank: adapts OpenCLIP's own ViTs, and this model's image tower is another")
    with from_extra("finetune", "--lora-rank"):
        from peft import LoraConfig, inject_adapter_in_model
    for block in blocks:
        block.attn = _LinearAttention(block.attn)
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=ADAPTED)  # type: ignore[arg-type]
    inject_adapter_in_model(config, model.visual, ADAPTER)
    trained = sum(parameter.numel() for parameter in model.visual.parameters() if parameter.requires_grad)
    logger.info(
        "--lora-rank %d: %s parameters of the vision tower are trained, the others frozen", rank, f"{trained:,}"
    )


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model would have without adapters, with what they add. Its own tensors otherwise."""
    merged = {}
    for name, value in model.state_dict().items():
        owner, adapted, rest = name.rpartition(".base_layer.")
        if adapted:
            layer: Any = model.get_submodule(owner)
            value = value + layer.get_delta_weight(ADAPTER).to(value.dtype) if rest == "weight" else value
            name = f"{owner}.{rest}".replace(".attn.in_proj.", ".attn.in_proj_")
        if ".lora_" not in name:
            merged[name] = value.detach()
    return merged


def checkpoint_weights(model: nn.Module, average: WeightAverage | None) -> dict[str, Any]:
    """What a checkpoint holds of a model in training: the average, if there is one, with adapters merged, is what every
    reader opens."""
    live = {name: value.detach() for name, value in model.state_dict().items()}
    with average.applied() if average else contextlib.nullcontext():
        return weights_content(merged_state(model), live, average.state() if average else {})


def use_float8(model: Any, how: str, device: torch.device) -> None:
    """In the blocks of the vision tower, in place. Parameters and their names stay as they are, in float32. `how`:
    "on", or "emulated", which rounds to float8 and multiplies in a wider type, on any device. Raises UserError without
    torchao, and for a device without such units."""
    if how == "on" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY):
        raise UserError("--fp8 on: needs an NVIDIA GPU from Ada or Hopper on; `--fp8 emulated` runs anywhere, slowly")
    with from_extra("fp8", "--fp8"):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    convert: Callable[[nn.Module], nn.Module] = partial(
        convert_to_float8_training, config=Float8LinearConfig(emulate=how == "emulated")
    )
    for block in model.visual.transformer.resblocks:
        convert(block)
        if getattr(block.attn, "is_fused", False):
            project_by(block.attn, convert)
