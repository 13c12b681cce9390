"""Configs of the baselines of each ov2 model X, with the same vision encoder: `coca-of-X`, `clip-of-X`, `ov1-of-X`
(OpenVision 1: X with a contrastive loss beside its caption loss) and `genlip-of-X` (GenLIP: one transformer).

All of the code behind CoCa and CLIP is OpenCLIP's own; the other two are ov2 models (related.py) whose decoder
sees all tokens. For CoCa and CLIP the encoder has X's sizes, norms and no ln_pre, plus what the baseline itself needs:
a learned position table, a trained projection to the text's width, and CoCa's attentional pooler (256 queries, 8 heads,
as in OpenCLIP's coca_ViT-L-14 and coca_ViT-B-32); CLIP averages the patches as X does. Text towers have the sizes of
X's decoder, CoCa's decoder has as many layers as its text tower (12 and 12 in both stock configs), and captions are as
long as X's. For ov2-vit-l-14 the results are coca_ViT-L-14 and ViT-L-14 except for the caption length, ln_pre, and
CLIP's pooling. OpenVision 1's text encoder is that of `clip-of-X`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip import factory as open_clip_factory

from open_clip_ov2.openclip.models.factory import (
    CONTRASTIVE_KEY,
    DECODER_KEY,
    MODEL_CONFIGS,
    ONE_TRANSFORMER_KEY,
    VISION_FIXED,
)

POOLER_HEADS = 8
_TOKENIZER_KEYS = {"context_length", "vocab_size", "pad_id", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"}


def coca_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """OpenCLIP's config of a CoCa around the encoder of an ov2 config."""
    text = _text_cfg(config)
    vision = {**_encoder(config), "attentional_pool": True, "attn_pooler_heads": POOLER_HEADS, "output_tokens": True}
    return {
        "embed_dim": text["width"],  # CoCa's decoder attends to pooled tokens of this width
        "vision_cfg": vision,
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {
            **{key: text[key] for key in ("context_length", "vocab_size", "width", "heads", "layers")},
            "attn_pooler_heads": text["heads"],
        },
        "custom_text": True,
    }


def clip_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """OpenCLIP's config of a CLIP around the encoder of an ov2 config."""
    text = _text_cfg(config)
    eos_id = config["text_cfg"]["eos_id"]
    if eos_id != text["vocab_size"] - 1:  # OpenCLIP's default pools at the largest id
        text |= {"pool_type": "eos", "eos_id": eos_id}
    vision = _encoder(config) | {key: VISION_FIXED[key] for key in ("pool_type", "final_ln_after_pool")}
    return {"embed_dim": text["width"], "vision_cfg": vision, "text_cfg": text}


def ov1_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """OpenVision 1's pair of losses around the encoder and the decoder of an ov2 config."""
    sizes = {key: config[DECODER_KEY][key] for key in ("width", "layers", "heads")}
    return {**config, CONTRASTIVE_KEY: sizes, "keep_ratio": 1.0}


def genlip_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """GenLIP's one transformer, which is the encoder of an ov2 config."""
    vision = config["vision_cfg"]
    width = vision["width"]
    sizes = {"width": width, "layers": vision["layers"], "heads": width // vision["head_width"]}
    decoder = {**sizes, "mlp_width": int(width * vision["mlp_ratio"])}
    return {**config, DECODER_KEY: decoder, "fusion": "prefix", ONE_TRANSFORMER_KEY: True, "keep_ratio": 1.0}


def _encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = {**VISION_FIXED, **config["vision_cfg"]}
    for key in ("pool_type", "final_ln_after_pool", "output_tokens"):
        del vision[key]
    return vision


def _text_cfg(config: Mapping[str, Any]) -> dict[str, Any]:
    decoder = config[DECODER_KEY]
    if decoder["mlp_width"] != 4 * decoder["width"]:
        # OpenCLIP's CoCa builds its decoder with a ratio of 4 whatever mlp_ratio says.
        raise ValueError(f"mlp_width {decoder['mlp_width']}: OpenCLIP's text towers need 4 x width")
    tokens = {key: value for key, value in config["text_cfg"].items() if key in _TOKENIZER_KEYS}
    return {**tokens, **{key: decoder[key] for key in ("width", "heads", "layers")}}


BASELINES = {"coca-of-": coca_of, "clip-of-": clip_of, "ov1-of-": ov1_of, "genlip-of-": genlip_of}


def add_baselines(folder: Path = MODEL_CONFIGS) -> None:
    """Register the baselines of all ov2 configs in a folder with OpenCLIP."""
    for path in sorted(folder.glob("*.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        for prefix, config_of in BASELINES.items():
            open_clip_factory._MODEL_CONFIGS[prefix + path.stem] = config_of(config)
    open_clip_factory._rescan_model_configs()  # sorts
