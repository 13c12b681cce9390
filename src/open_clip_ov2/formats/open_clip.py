"""OpenCLIP's own format: a stock CLIP that needs no plugin, and the whole model for OpenCLIP with this plugin.

The stock CLIP has our encoder. `encode_image` is the pooled output, and `visual.forward_intermediates` gives patch
tokens. Its text tower is one narrow block of zeros, because stock OpenCLIP has no model without a text tower; the
output of `encode_text` is meaningless.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from open_clip_ov2.files import write_json
from open_clip_ov2.formats.encoder import EPS, Encoder, mlp_ratio
from open_clip_ov2.formats.model_files import write_tensors
from open_clip_ov2.formats.target import ExportSource, Target

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# The smallest text tower; context length and vocabulary are those of OpenCLIP's tokenizer.
_TEXT_STUB = {"context_length": 77, "vocab_size": 49_408, "width": 8, "heads": 1, "layers": 1}


def write(source: ExportSource, folder: Path) -> None:
    """Write open_clip_config.json and open_clip_model.safetensors."""
    encoder = source.encoder
    model_cfg = {"embed_dim": encoder.output_width, "vision_cfg": vision_cfg(encoder), "text_cfg": _TEXT_STUB}
    shapes = source.clip_shapes(model_cfg)
    stub = {name: torch.zeros(shape) for name, shape in shapes.items() if not name.startswith("visual.")}
    visual = {f"visual.{name}": value for name, value in encoder.state.items()}
    write_json(folder / CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": asdict(encoder.preprocessing)})
    write_tensors(folder / WEIGHTS, {**visual, **stub})


def write_whole(source: ExportSource, folder: Path) -> None:
    """Write the same files for the model with its decoder, and its tokenizer. Raises UserError."""
    source.write_whole(folder)


def vision_cfg(encoder: Encoder) -> dict[str, Any]:
    """The `vision_cfg` of this encoder in every OpenCLIP config."""
    return {
        "image_size": encoder.config_size,
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
