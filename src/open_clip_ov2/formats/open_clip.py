"""OpenCLIP's own format: a stock CLIP that needs no plugin, and the whole model for OpenCLIP with this plugin.

The stock CLIP has our encoder. `encode_image` is the pooled output, and `visual.forward_intermediates` gives patch
tokens. Its text tower is one narrow block of zeros, because stock OpenCLIP has no model without a text tower; the
output of `encode_text` is meaningless.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.files import write_json
from open_clip_ov2.formats.encoder import EPS, Encoder, mlp_ratio
from open_clip_ov2.formats.model_files import write_tensors
from open_clip_ov2.formats.target import ExportSource, Target

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_TEXT_WIDTH, _TEXT_LENGTH, _TEXT_VOCAB = 8, 77, 49_408  # the last two are OpenCLIP's tokenizer's


def write(source: ExportSource, folder: Path) -> list[str]:
    """Write open_clip_config.json and open_clip_model.safetensors."""
    write_json(folder / CONFIG, config(source.encoder))
    write_tensors(folder / WEIGHTS, state_dict(source.encoder))
    return []


def write_whole(source: ExportSource, folder: Path) -> list[str]:
    """Write the same files for the model with its decoder, and its tokenizer. Raises UserError."""
    source.write_whole(folder)
    return []


def vision_cfg(encoder: Encoder) -> dict[str, Any]:
    """The `vision_cfg` of this encoder in every OpenCLIP config."""
    return {
        "image_size": encoder.square_size,
        "layers": encoder.layers,
        "width": encoder.width,
        "head_width": encoder.width // encoder.heads,
        "mlp_ratio": mlp_ratio(encoder.width, encoder.mlp_width),
        "patch_size": encoder.patch_size,
        "no_ln_pre": True,
        "pool_type": "avg",
        "final_ln_after_pool": True,
        "norm_kwargs": {"eps": EPS},
    }


def preprocess_cfg(encoder: Encoder) -> dict[str, Any]:
    pre = encoder.preprocessing
    return {
        "mean": list(pre.mean),
        "std": list(pre.std),
        "interpolation": pre.interpolation,
        "resize_mode": pre.resize_mode,
    }


def config(encoder: Encoder) -> dict[str, Any]:
    text_cfg = {
        "context_length": _TEXT_LENGTH, "vocab_size": _TEXT_VOCAB, "width": _TEXT_WIDTH, "heads": 1, "layers": 1,
    }  # fmt: skip
    model_cfg = {"embed_dim": encoder.output_width, "vision_cfg": vision_cfg(encoder), "text_cfg": text_cfg}
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg(encoder)}


def state_dict(encoder: Encoder) -> dict[str, Tensor]:
    """Under the names of OpenCLIP's CLIP."""
    width, block = _TEXT_WIDTH, "transformer.resblocks.0."
    shapes = {
        "token_embedding.weight": (_TEXT_VOCAB, width),
        "positional_embedding": (_TEXT_LENGTH, width),
        "text_projection": (width, encoder.output_width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        f"{block}ln_1.weight": (width,),
        f"{block}ln_1.bias": (width,),
        f"{block}ln_2.weight": (width,),
        f"{block}ln_2.bias": (width,),
        f"{block}attn.in_proj_weight": (3 * width, width),
        f"{block}attn.in_proj_bias": (3 * width,),
        f"{block}attn.out_proj.weight": (width, width),
        f"{block}attn.out_proj.bias": (width,),
        f"{block}mlp.c_fc.weight": (4 * width, width),
        f"{block}mlp.c_fc.bias": (4 * width,),
        f"{block}mlp.c_proj.weight": (width, 4 * width),
        f"{block}mlp.c_proj.bias": (width,),
    }
    stub = {name: torch.zeros(shape) for name, shape in shapes.items()}
    visual = {f"visual.{name}": tensor for name, tensor in encoder.state.items()}
    return {**visual, **stub, "logit_scale": torch.zeros(())}


TARGET = Target(
    name="open-clip",
    summary="OpenCLIP without this plugin: create_model_from_pretrained('local-dir:FOLDER')",
    library="open_clip",
    example="""import open_clip  # this plugin is not needed

model, preprocess = open_clip.create_model_from_pretrained("{schema}{name}")
out = model.visual.forward_intermediates(images, indices=1, output_fmt="NLC")
tokens = out["image_intermediates"][0]  # patch tokens before the final norm (B, N, D)""",
    write=write,
)
WHOLE_TARGET = Target(
    name="ov2",
    summary="OpenCLIP with this plugin: the whole model, decoder included, in safetensors",
    library="open_clip",
    example="""import open_clip, open_clip_ov2

model, preprocess = open_clip.create_model_from_pretrained("{schema}{name}")
tokens = model.encode_image_tokens(images)  # patch tokens before the final norm (B, N, D)
ids = model.generate(images)  # captions as token ids""",
    write=write_whole,
)
