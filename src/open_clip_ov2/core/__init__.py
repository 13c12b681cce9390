"""The model and its loss, on torch alone. Read reference.py first: it is the whole method in plain torch.

Shape legend of every module here:

    B  batch                 N  image (patch) tokens      K  kept image tokens
    L  caption tokens        S  sequence, K + L           D  width of the encoder or decoder
    V  vocabulary            H  heads
"""

from open_clip_ov2.core.decoder import FUSIONS, DecoderConfig, TextDecoder
from open_clip_ov2.core.loss import IGNORE_INDEX, CaptionLoss, caption_targets
from open_clip_ov2.core.model import CaptionModel, TextConfig
from open_clip_ov2.core.positions import sincos_2d
from open_clip_ov2.core.tokens import KeepRatio, TokenDrop, gather_tokens, num_kept, sample_kept_indices
from open_clip_ov2.core.vision import VisionModel
from open_clip_ov2.core.vit_fast import image_features

__all__ = [
    "FUSIONS", "IGNORE_INDEX", "CaptionLoss", "CaptionModel", "DecoderConfig", "KeepRatio", "TextConfig", "TextDecoder",
    "TokenDrop", "VisionModel", "caption_targets", "gather_tokens", "image_features", "num_kept", "sample_kept_indices",
    "sincos_2d",
]  # fmt: skip
