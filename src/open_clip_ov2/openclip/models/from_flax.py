"""A model of ours from Flax parameters, through OpenCLIP's `create_model`'s own builder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from open_clip.transform import PreprocessCfg
from torch import Tensor

from open_clip_ov2.core import CaptionModel
from open_clip_ov2.errors import UserError
from open_clip_ov2.formats import FlaxSizes
from open_clip_ov2.formats.encoder import mlp_ratio
from open_clip_ov2.formats.flax import NOT_IN_FLAX
from open_clip_ov2.openclip.models.factory import build_caption_model
from open_clip_ov2.openclip.models.preprocess import family_preprocess
from open_clip_ov2.openclip.models.tokenizer import BOS_ID, EOS_ID, PAD_ID
from open_clip_ov2.openclip.models.weights import check_fit


def build_from_flax(
    sizes: FlaxSizes, state: Mapping[str, Tensor], image_size: int, context_length: int, fusion: str | None = None
) -> CaptionModel:
    """In evaluation mode, with the reference's word-piece ids. Raises UserError."""
    fusion = fusion or ("cross_attn" if sizes.cross else "prefix")
    if (fusion == "cross_attn") != sizes.cross:
        kind = "has" if sizes.cross else "has no"
        raise UserError(f"--fusion {fusion}: the decoder {kind} cross-attention blocks")
    if image_size % sizes.patch_size:
        raise UserError(f"--image-size {image_size}: not a multiple of the patch size, {sizes.patch_size}")
    try:
        model = build_caption_model(**_config(sizes, image_size, context_length), fusion=fusion)
        expected = {name: value for name, value in model.state_dict().items() if name not in NOT_IN_FLAX}
        check_fit("the Flax parameters", state, expected)
    except ValueError as error:
        raise UserError(str(error)) from error
    model.load_state_dict(dict(state), strict=False)  # the table and the identity are the model's own
    cfg = family_preprocess(asdict(PreprocessCfg()))
    model.visual.preprocess_cfg = {**cfg, "size": model.visual.image_size}
    return model.eval()


def _config(sizes: FlaxSizes, image_size: int, context_length: int) -> dict[str, Any]:
    """OpenCLIP's `model_cfg`, but for the fusion."""
    return {
        "embed_dim": sizes.width,
        "vision_cfg": {
            "image_size": image_size,
            "patch_size": sizes.patch_size,
            "width": sizes.width,
            "layers": sizes.layers,
            "head_width": sizes.width // sizes.heads,
            "mlp_ratio": mlp_ratio(sizes.width, sizes.mlp_width),
        },
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": sizes.vocab_size,
            "bos_id": BOS_ID,
            "eos_id": EOS_ID,
            "pad_id": PAD_ID,
        },
        "decoder_cfg": {
            "width": sizes.decoder_width,
            "layers": sizes.decoder_layers,
            "heads": sizes.decoder_heads,
            "mlp_width": sizes.decoder_mlp_width,
        },
    }
