"""timm: a VisionTransformer with mean pooling and the norm after it, `timm.create_model("local-dir:FOLDER")`.

`forward_features` gives class and patch tokens before the final norm; the model's output is the pooled feature.
Shapes: D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.files import write_json
from open_clip_ov2.formats.encoder import Encoder, mlp_ratio
from open_clip_ov2.formats.model_files import write_tensors
from open_clip_ov2.formats.names import BLOCK, Names, in_a_batch, renamed
from open_clip_ov2.formats.target import ExportSource, Target

# timm's entry for each published size, and the nearest one for the rest; model_args has what differs from it.
_ENTRIES = {
    (192, 16): "vit_tiny_patch16_224", (384, 16): "vit_small_patch16_224", (384, 8): "vit_small_patch8_224",
    (768, 16): "vit_base_patch16_224", (768, 8): "vit_base_patch8_224", (1024, 14): "vit_large_patch14_224",
    (1280, 14): "vit_huge_patch14_224", (1408, 14): "vit_giant_patch14_224",
}  # fmt: skip
_NEAREST = "vit_large_patch14_224"
NAMES: Names = {
    "class_embedding": ("cls_token",),
    "positional_embedding": ("pos_embed",),
    "conv1.": ("patch_embed.proj.",),
    f"{BLOCK}attn.in_proj_": ("blocks.*.attn.qkv.",),
    f"{BLOCK}attn.out_proj.": ("blocks.*.attn.proj.",),
    f"{BLOCK}mlp.c_fc.": ("blocks.*.mlp.fc1.",),
    f"{BLOCK}mlp.c_proj.": ("blocks.*.mlp.fc2.",),
    f"{BLOCK}ln_1.": ("blocks.*.norm1.",),
    f"{BLOCK}ln_2.": ("blocks.*.norm2.",),
}


def write(source: ExportSource, folder: Path) -> None:
    """Write config.json and model.safetensors."""
    encoder = source.encoder
    write_json(folder / "config.json", config(encoder))
    write_tensors(folder / "model.safetensors", state_dict(encoder))


def config(encoder: Encoder) -> dict[str, Any]:
    pre = encoder.preprocessing
    return {
        "architecture": _ENTRIES.get((encoder.width, encoder.patch_size), _NEAREST),
        "num_classes": encoder.output_width,
        "num_features": encoder.width,
        "global_pool": "avg",
        "model_args": {
            "img_size": encoder.config_size,
            "patch_size": encoder.patch_size,
            "embed_dim": encoder.width,
            "depth": encoder.layers,
            "num_heads": encoder.heads,
            "mlp_ratio": mlp_ratio(encoder.width, encoder.mlp_width),
            "class_token": True,
            "global_pool": "avg",
            "fc_norm": True,
        },
        "pretrained_cfg": {
            "input_size": [3, *encoder.image_size],
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "crop_mode": "squash" if pre.resize_mode == "squash" else "center",
            "interpolation": pre.interpolation,
            "mean": list(pre.mean),
            "std": list(pre.std),
            "num_classes": encoder.output_width,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def state_dict(encoder: Encoder) -> dict[str, Tensor]:
    """Under timm's names. Its head has a bias, which is zero here."""
    return {
        **renamed(in_a_batch(encoder.state), NAMES),
        "fc_norm.weight": encoder.state["ln_post.weight"],
        "fc_norm.bias": encoder.state["ln_post.bias"],
        "head.weight": encoder.state["proj"].T,
        "head.bias": torch.zeros(encoder.output_width),
    }


TARGET = Target(
    name="timm",
    summary="timm.create_model('local-dir:FOLDER', pretrained=True)",
    library="timm",
    example="""import timm

model = timm.create_model("{schema}{name}", pretrained=True).eval()
tokens = model.forward_features(images)[:, 1:]  # patch tokens before the final norm (B, N, D)""",
    write=write,
)
