"""The authors' release format, which their code loads: a bare encoder, and the caption decoder beside it.

Source: docs/reference.md, "Released encoder checkpoints". The encoder is a pickle file of plain tensors because their
loader reads that; the decoder is safetensors.
"""

from __future__ import annotations

from pathlib import Path

import torch

from open_clip_ov2.files import write_json, write_text
from open_clip_ov2.formats.model_files import write_tensors
from open_clip_ov2.formats.open_clip import CONFIG, vision_cfg
from open_clip_ov2.formats.target import CaptionDecoder, ExportSource, Target

DECODER_FILE, DECODER_CONFIG, VOCAB_FILE = (
    "caption_decoder.safetensors", "text_decoder_config.json", "bert_base_vocab_bos_eos.txt",
)  # fmt: skip
# The text_cfg of a released config, for which the release has no weights.
_TEXT_CFG = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}


def write(source: ExportSource, folder: Path) -> list[str]:
    """Write open_clip_config.json and open_clip_pytorch_model.bin, and the three files of a decoder if possible."""
    encoder, decoder = source.encoder, source.decoder
    vision = {**vision_cfg(encoder), "output_tokens": True}
    model_cfg = {"embed_dim": encoder.output_width, "vision_cfg": vision, "text_cfg": _TEXT_CFG}
    write_json(folder / CONFIG, {"model_cfg": model_cfg})
    torch.save({key: value.clone() for key, value in encoder.state.items()}, folder / "open_clip_pytorch_model.bin")
    if not isinstance(decoder, CaptionDecoder):
        return [f"wrote the encoder without a caption decoder: {decoder}"]
    about = {
        "architecture": "OpenVision2TextDecoder",
        "fusion_style": "concat",
        **decoder.config,
        "vision_width": encoder.width,
        "tokenizer": f"bert wordpiece ({VOCAB_FILE}), lowercase",
    }
    write_json(folder / DECODER_CONFIG, about)
    write_tensors(folder / DECODER_FILE, decoder.state)
    write_text(folder / VOCAB_FILE, decoder.vocabulary)
    return []


TARGET = Target(
    name="released",
    summary="the authors' format: the encoder and, if it is of their kind, the caption decoder",
    library="open_clip",
    example="""import open_clip, open_clip_ov2

model, preprocess = open_clip.create_model_from_pretrained("{schema}{name}")
tokens = model.encode_image_tokens(images)  # patch tokens before the final norm (B, N, D)""",
    write=write,
)
