"""The authors' release format, so that users of their code can load ours: a bare encoder, and the caption decoder.

Source: docs/reference.md, "Released encoder checkpoints". Their loader reads the pickle file, which holds plain tensors
alone; the decoder is safetensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.formats.encoder import Encoder
from open_clip_ov2.formats.model_files import write_json, write_tensors
from open_clip_ov2.formats.open_clip import vision_cfg

# The released config's text_cfg, which no weights belong to.
_TEXT_CFG = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}


@dataclass(frozen=True)
class CaptionDecoder:
    """A prefix-LM decoder trained with word pieces, which is what the released format knows."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    vocab_file: Path
    state: Mapping[str, Tensor]


def write(encoder: Encoder, folder: Path, decoder: CaptionDecoder | None = None) -> None:
    """open_clip_config.json, open_clip_pytorch_model.bin and, with a decoder, the three files of it."""
    write_json(folder / "open_clip_config.json", config(encoder))
    torch.save({key: value.clone() for key, value in encoder.state.items()}, folder / "open_clip_pytorch_model.bin")
    if decoder is not None:
        write_json(folder / "text_decoder_config.json", _decoder_config(decoder, encoder.width))
        write_tensors(folder / "caption_decoder.safetensors", decoder.state)
        shutil.copyfile(decoder.vocab_file, folder / "bert_base_vocab_bos_eos.txt")


def config(encoder: Encoder) -> dict[str, Any]:
    return {
        "model_cfg": {
            "embed_dim": encoder.output_width,
            "vision_cfg": {**vision_cfg(encoder), "output_tokens": True},
            "text_cfg": _TEXT_CFG,
        }
    }


def _decoder_config(decoder: CaptionDecoder, vision_width: int) -> dict[str, Any]:
    return {
        "architecture": "OpenVision2TextDecoder",
        "fusion_style": "concat",
        "width": decoder.width,
        "depth": decoder.layers,
        "num_heads": decoder.heads,
        "mlp_dim": decoder.mlp_width,
        "vocab_size": decoder.vocab_size,
        "vision_width": vision_width,
        "pad_id": decoder.pad_id,
        "bos_id": decoder.bos_id,
        "eos_id": decoder.eos_id,
        "tokenizer": "bert wordpiece (bert_base_vocab_bos_eos.txt), lowercase",
    }
