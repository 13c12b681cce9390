"""OpenVision 2 for OpenCLIP. `import open_clip_ov2` registers the `ov2-vit-*` models; nothing else to call."""

from open_clip_ov2.openclip.models.version import check_open_clip

check_open_clip()

from open_clip_ov2.core import CaptionLoss, CaptionModel, VisionModel, image_features  # noqa: E402
from open_clip_ov2.openclip.models.open_model import create_caption_model, open_model  # noqa: E402
from open_clip_ov2.openclip.models.tokenizer import WordPieceTokenizer  # noqa: E402
from open_clip_ov2.openclip.patches import register, unregister  # noqa: E402

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
