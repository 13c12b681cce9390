"""A model as a folder of OpenCLIP's: config, weights and vocabulary, loadable by `local-dir:` and from the hub."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from open_clip.tokenizer import HFTokenizer

from open_clip_ov2.core import CaptionModel, VisionModel
from open_clip_ov2.errors import UserError
from open_clip_ov2.formats.authors import CaptionDecoder
from open_clip_ov2.formats.encoder import Encoder
from open_clip_ov2.formats.model_files import write_json, write_tensors
from open_clip_ov2.formats.open_clip import preprocess_cfg, vision_cfg
from open_clip_ov2.openclip.models.open_model import CONFIG
from open_clip_ov2.openclip.models.tokenizer import MODE, WordPieceTokenizer, find_vocab

WEIGHTS = "open_clip_model.safetensors"


def write_model_folder(model: CaptionModel, encoder: Encoder, tokenizer: Any, folder: Path, name: str) -> None:
    """The whole model, decoder included. `name`: what the folder will be called, or its hub name; its tokenizer will
    be found under it."""
    cfg = model_cfg(model, encoder)
    if isinstance(tokenizer, WordPieceTokenizer):
        cfg["text_cfg"] |= {"hf_tokenizer_name": name, "tokenizer_mode": MODE}
        shutil.copyfile(find_vocab(tokenizer.source), folder / "vocab.txt")
    elif isinstance(tokenizer, HFTokenizer):
        cfg["text_cfg"] |= {"hf_tokenizer_name": name}
        tokenizer.save_pretrained(str(folder))
    write_json(folder / CONFIG, {"model_cfg": cfg, "preprocess_cfg": preprocess_cfg(encoder)})
    write_tensors(folder / WEIGHTS, model.state_dict())


def model_cfg(model: CaptionModel, encoder: Encoder) -> dict[str, Any]:
    """OpenCLIP's `model_cfg` that builds this model again."""
    decoder = asdict(model.text_decoder.config)
    fusion = decoder.pop("fusion")
    return {
        "embed_dim": encoder.width,
        "vision_cfg": {**vision_cfg(encoder), "output_tokens": True},
        "text_cfg": asdict(model.text_config),
        "decoder_cfg": decoder,
        "fusion": fusion,
        "keep_ratio": str(model.token_drop.keep_ratio),
        "eval_keep_ratio": model.token_drop.eval_keep_ratio,
        "custom_text": True,
    }


def encoder_of(model: Any, preprocess_cfg: dict[str, Any]) -> Encoder:
    """Raises UserError for a model that is not ours."""
    if not isinstance(model, (CaptionModel, VisionModel)):
        raise UserError(f"{type(model).__name__} is no ov2 model, and its encoder is another: not to be exported")
    return Encoder.of(model.visual, preprocess_cfg)


def released_decoder(model: Any, tokenizer: Any) -> tuple[CaptionDecoder | None, str]:
    """The decoder in the released format, or none and the reason."""
    if not isinstance(model, CaptionModel):
        return None, "the model has none"
    config, text = model.text_decoder.config, model.text_config
    if config.fusion != "prefix":
        return None, f"the released format knows prefix decoders, and this one's fusion is {config.fusion}"
    if not isinstance(tokenizer, WordPieceTokenizer):
        return None, "the released format knows word pieces (--tokenizer), and this one has OpenCLIP's"
    return CaptionDecoder(
        config.width, config.layers, config.heads, config.mlp_width, text.vocab_size, text.bos_id, text.eos_id,
        text.pad_id, find_vocab(tokenizer.source), model.text_decoder.state_dict(),
    ), ""  # fmt: skip
