"""OpenVision 2 for OpenCLIP. `import open_clip_ov2` registers the `ov2-vit-*` models; nothing else to call."""

from open_clip_ov2.seam.version import check_open_clip

check_open_clip()

from open_clip_ov2.core import CaptionLoss, CaptionModel  # noqa: E402
from open_clip_ov2.seam.patches import register, unregister  # noqa: E402
from open_clip_ov2.seam.tokenizer import WordPieceTokenizer  # noqa: E402

__version__ = "0.1.0"
__all__ = ["CaptionLoss", "CaptionModel", "WordPieceTokenizer", "register", "unregister"]

register()
