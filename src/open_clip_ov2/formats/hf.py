"""transformers: a ViTModel with its image processor, no remote code.

The same architecture: class token, stored position table, pre-norm, exact GELU, eps 1e-6. Parameter names are those of
transformers' ViT since its first release, which 4.x and 5.x both read.
Shapes: D width, N patches, P patch size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.formats.encoder import EPS, Encoder
from open_clip_ov2.formats.model_files import write_json, write_tensors

_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL.Image.Resampling


def write(encoder: Encoder, folder: Path) -> None:
    """config.json, model.safetensors, preprocessor_config.json."""
    write_json(folder / "config.json", {"architectures": ["ViTModel"], **config(encoder)})
    write_json(folder / "preprocessor_config.json", image_processor(encoder))
    write_tensors(folder / "model.safetensors", state_dict(encoder))


def config(encoder: Encoder) -> dict[str, Any]:
    """Of ViTConfig. The pooler is the identity on the class token: the family pools patch tokens instead."""
    return {
        "model_type": "vit",
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.layers,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp_width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": EPS,
        "image_size": encoder.square_size,
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "pooler_output_size": encoder.width,
        "pooler_act": "linear",
        "torch_dtype": "float32",
    }


def image_processor(encoder: Encoder) -> dict[str, Any]:
    """CLIP's processor is the one that has short side and centre crop; the name says nothing about the model."""
    side, pre = encoder.square_size, encoder.preprocessing
    squash = pre.resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side} if squash else {"shortest_edge": side},
        "resample": _RESAMPLE[pre.interpolation],
        "do_center_crop": not squash,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pre.mean),
        "image_std": list(pre.std),
    }


def state_dict(encoder: Encoder) -> dict[str, Tensor]:
    """transformers' names. Its patch embedding has a bias, which is zero here."""
    state, width = encoder.state, encoder.width
    out = {
        "embeddings.cls_token": state["class_embedding"].reshape(1, 1, width),
        "embeddings.position_embeddings": state["positional_embedding"].unsqueeze(0),
        "embeddings.patch_embeddings.projection.weight": state["conv1.weight"],
        "embeddings.patch_embeddings.projection.bias": torch.zeros(width),
        "layernorm.weight": state["ln_post.weight"],
        "layernorm.bias": state["ln_post.bias"],
        "pooler.dense.weight": torch.eye(width),
        "pooler.dense.bias": torch.zeros(width),
    }
    for index in range(encoder.layers):
        ours, theirs = f"transformer.resblocks.{index}", f"encoder.layer.{index}"
        for kind in ("weight", "bias"):
            parts = state[f"{ours}.attn.in_proj_{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                out[f"{theirs}.attention.attention.{name}.{kind}"] = part
            out[f"{theirs}.attention.output.dense.{kind}"] = state[f"{ours}.attn.out_proj.{kind}"]
            out[f"{theirs}.intermediate.dense.{kind}"] = state[f"{ours}.mlp.c_fc.{kind}"]
            out[f"{theirs}.output.dense.{kind}"] = state[f"{ours}.mlp.c_proj.{kind}"]
            out[f"{theirs}.layernorm_before.{kind}"] = state[f"{ours}.ln_1.{kind}"]
            out[f"{theirs}.layernorm_after.{kind}"] = state[f"{ours}.ln_2.{kind}"]
    return out
