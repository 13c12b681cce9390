"""OpenVision 2 for OpenCLIP. `import open_clip_ov2` registers the `ov2-vit-*` models; nothing else to call."""

from open_clip_ov2.seam.version import check_open_clip

check_open_clip()

from open_clip_ov2.core import CaptionLoss, CaptionModel, VisionModel, image_features  # noqa: E402
from open_clip_ov2.seam.patches import register, unregister  # noqa: E402
from open_clip_ov2.seam.sources import create_caption_model, open_model  # noqa: E402
from open_clip_ov2.seam.tokenizer import WordPieceTokenizer  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "CaptionLoss",
    "CaptionModel",
    "VisionModel",
    "WordPieceTokenizer",
    "create_caption_model",
    "image_features",
    "open_model",
    "register",
    "unregister",
]

register()
