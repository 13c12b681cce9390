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

from open_clip_ov2.errors import UserError
from open_clip_ov2.files import write_json
from open_clip_ov2.formats.encoder import EPS, Encoder, Preprocessing
from open_clip_ov2.formats.model_files import write_tensors
from open_clip_ov2.formats.names import BLOCK, Names, in_a_batch, renamed
from open_clip_ov2.formats.target import ExportSource, Target

_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL.Image.Resampling
NAMES: Names = {
    "class_embedding": ("embeddings.cls_token",),
    "positional_embedding": ("embeddings.position_embeddings",),
    "conv1.": ("embeddings.patch_embeddings.projection.",),
    f"{BLOCK}attn.in_proj_": tuple(f"encoder.layer.*.attention.attention.{one}." for one in ("query", "key", "value")),
    f"{BLOCK}attn.out_proj.": ("encoder.layer.*.attention.output.dense.",),
    f"{BLOCK}mlp.c_fc.": ("encoder.layer.*.intermediate.dense.",),
    f"{BLOCK}mlp.c_proj.": ("encoder.layer.*.output.dense.",),
    f"{BLOCK}ln_1.": ("encoder.layer.*.layernorm_before.",),
    f"{BLOCK}ln_2.": ("encoder.layer.*.layernorm_after.",),
}


def write(source: ExportSource, folder: Path) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors."""
    encoder = source.encoder
    write_json(folder / "config.json", {"architectures": ["ViTModel"], **config(encoder)})
    # CLIP's processor resizes the short side and crops the center; its name does not refer to the model.
    settings = image_settings(encoder.image_size, encoder.preprocessing)
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor", **settings})
    write_tensors(folder / "model.safetensors", state_dict(encoder))


def config(encoder: Encoder) -> dict[str, Any]:
    """Of ViTConfig, where it differs from its defaults.

    The pooler is the identity on the class token, since an ov2 model pools patch tokens instead.
    """
    return {
        "model_type": "vit",
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.layers,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp_width,
        "layer_norm_eps": EPS,
        "image_size": encoder.config_size,
        "patch_size": encoder.patch_size,
        "pooler_act": "linear",
        "torch_dtype": "float32",
    }


def image_settings(sides: tuple[int, int], pre: Preprocessing) -> dict[str, Any]:
    """Of an image processor for images of height and width `sides`. Raises UserError for images that are not square:
    there the sides' ratio says which side is resized, and the processor does not know that."""
    (height, width), squash = sides, pre.resize_mode == "squash"
    if height != width and not squash:
        raise UserError(
            f"transformers' image processor cannot prepare images of {height} x {width}: it resizes the short side, "
            "whatever their ratio; --to timm, onnx, open-clip or ov2 can, or give a square --image-size"
        )
    return {
        "size": {"height": height, "width": width} if squash else {"shortest_edge": height},
        "resample": _RESAMPLE[pre.interpolation],
        "do_center_crop": not squash,
        "crop_size": {"height": height, "width": width},
        "image_mean": list(pre.mean),
        "image_std": list(pre.std),
    }


def state_dict(encoder: Encoder) -> dict[str, Tensor]:
    """Under transformers' names."""
    return {
        **renamed(in_a_batch(encoder.state), NAMES),
        "layernorm.weight": encoder.state["ln_post.weight"],
        "layernorm.bias": encoder.state["ln_post.bias"],
        "pooler.dense.weight": torch.eye(encoder.width),
        "pooler.dense.bias": torch.zeros(encoder.width),
    }


TARGET = Target(
    name="hf",
    summary="transformers: AutoModel.from_pretrained(FOLDER), a ViTModel with its image processor",
    library="transformers",
    example="""from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained("{name}"), AutoModel.from_pretrained("{name}")
out = model(**processor(image, return_tensors="pt"), output_hidden_states=True)
tokens = out.hidden_states[-1][:, 1:]  # patch tokens before the final norm (B, N, D)""",
    write=write,
)
