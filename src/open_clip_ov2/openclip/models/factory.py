"""From a model config to a CaptionModel, inside OpenCLIP's own factory functions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import factory as open_clip_factory
from open_clip import model as open_clip_model
from torch import Tensor, nn

from open_clip_ov2.core import CaptionModel, DecoderConfig, KeepRatio, TextConfig, sincos_2d
from open_clip_ov2.core.vit_fast import use_fast_parts

logger = logging.getLogger(__name__)

MODEL_CONFIGS = Path(__file__).parents[2] / "model_configs"
DECODER_KEY = "decoder_cfg"  # a config with this key is one of ours
_TOP_KEYS = {
    "embed_dim", "vision_cfg", "text_cfg", DECODER_KEY, "fusion", "keep_ratio", "eval_keep_ratio",
    "cast_dtype", "output_dict",
}  # fmt: skip
# What makes OpenCLIP's VisionTransformer the reference's (docs/reference.md, "Released encoder checkpoints").
VISION_FIXED = {
    "no_ln_pre": True,
    "pool_type": "avg",
    "final_ln_after_pool": True,
    "output_tokens": True,
    "norm_kwargs": {"eps": 1e-6},
}


def is_ov2_config(config: Mapping[str, Any] | None) -> bool:
    return config is not None and DECODER_KEY in config


def is_ov2_model(model_name: str) -> bool:
    """Whether a name known to OpenCLIP's registry is an ov2 model."""
    return is_ov2_config(open_clip_factory.get_model_config(model_name))


def build_caption_model(**config: Any) -> CaptionModel:
    """A CaptionModel from the keys of a model config; called by OpenCLIP's `create_model`.

    Raises ValueError for unknown keys and values out of range.
    """
    check_keys("model config", config, _TOP_KEYS)
    vision_cfg = {**config["vision_cfg"]}
    for key, value in VISION_FIXED.items():
        if vision_cfg.setdefault(key, value) != value:
            raise ValueError(f"an ov2 model has vision_cfg.{key} = {value!r}, not {vision_cfg[key]!r}")
    if config["embed_dim"] != vision_cfg["width"]:
        raise ValueError(f"an ov2 model has embed_dim = vision_cfg.width, got {config['embed_dim']}")
    visual = open_clip_model._build_vision_tower(config["embed_dim"], vision_cfg, cast_dtype=config.get("cast_dtype"))
    use_fast_parts(visual)
    init_vision(visual)
    decoder_cfg = {**config[DECODER_KEY]}
    if "fusion" in config:
        decoder_cfg["fusion"] = config["fusion"]
    check_keys("decoder_cfg", decoder_cfg, {field.name for field in fields(DecoderConfig)})
    return CaptionModel(
        visual,
        DecoderConfig(**decoder_cfg),
        text_config(config["text_cfg"]),
        keep_ratio=KeepRatio.of(config.get("keep_ratio", 0.35)),
        eval_keep_ratio=config.get("eval_keep_ratio"),
        output_dict=config.get("output_dict", True),
    )


def text_config(text_cfg: Mapping[str, Any]) -> TextConfig:
    """The part of `text_cfg` that the model needs; the rest is the tokenizer's."""
    tokenizer_keys = {"hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"}
    names = {field.name for field in fields(TextConfig)}
    check_keys("text_cfg", text_cfg, names | tokenizer_keys)
    return TextConfig(**{key: value for key, value in text_cfg.items() if key in names})


def check_keys(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown key {key!r} in {where}{hint} (known: {', '.join(sorted(known))})")


@torch.no_grad()
def init_vision(visual: nn.Module) -> None:
    """big_vision's initialisation of a ViT (OpenCLIP leaves torch's defaults).

    Xavier-uniform attention (each of q, k, v by itself) and MLP kernels, MLP biases normal(1e-6), patch
    embedding LeCun-normal. The class token is normal(0.02), not zero: with a zero position row LayerNorm would see
    a zero vector and multiply its gradient by eps^-0.5 = 1000. The untrained head is the identity.
    """
    vit: Any = visual
    fan_in = vit.conv1.weight[0].numel()
    nn.init.trunc_normal_(vit.conv1.weight, std=fan_in**-0.5 / 0.87962566103423978, a=-2.0, b=2.0)
    nn.init.normal_(vit.class_embedding, std=0.02)
    for block in vit.transformer.resblocks:
        for part in block.attn.in_proj_weight.chunk(3):
            nn.init.xavier_uniform_(part)
        nn.init.zeros_(block.attn.in_proj_bias)
        nn.init.xavier_uniform_(block.attn.out_proj.weight)
        nn.init.zeros_(block.attn.out_proj.bias)
        for linear in (block.mlp.c_fc, block.mlp.c_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)
    nn.init.eye_(vit.proj)


# --- what patches.py puts into open_clip.factory -------------------------------------------------------


def recompute_position_table(original: Callable[..., None]) -> Callable[..., None]:
    """A fixed table is recomputed for the new grid; a checkpoint that holds any other is refused."""

    def resize_pos_embed(state_dict: dict[str, Tensor], model: nn.Module, *args: Any, **kwargs: Any) -> None:
        stored = state_dict.get("visual.positional_embedding")
        if not isinstance(model, CaptionModel) or stored is None:
            original(state_dict, model, *args, **kwargs)
            return
        table = model.position_table()
        side = round((stored.shape[0] - 1) ** 0.5)
        grid = model.visual.grid_size if stored.shape == table.shape else (side, side)
        if stored.shape != (1 + grid[0] * grid[1], table.shape[1]) or not torch.allclose(
            stored.float().cpu(),
            sincos_2d(grid, table.shape[1]),
            atol=1e-2 if stored.dtype != torch.float32 else 1e-5,
        ):
            raise ValueError(
                f"visual.positional_embedding of shape {tuple(stored.shape)} is not the fixed 2-D sine-cosine table "
                f"of an ov2 model of width {table.shape[1]}"
            )
        if stored.shape != table.shape:
            logger.info("position table recomputed: grid %s -> %s", grid, model.visual.grid_size)
        state_dict["visual.positional_embedding"] = table.to(stored.device)

    return resize_pos_embed


def known_models() -> list[str]:
    return open_clip.list_models()
