"""OpenVision 2 for OpenCLIP: `import open_clip_ov2` registers the `ov2-vit-*` models with `open_clip`.

```python
import open_clip_ov2 as ov2

run = ov2.train(["--model", "ov2-vit-l-14", "--train-data", "shards/{000..099}.tar"])
model = ov2.open_model(run).model
```
"""

from importlib.metadata import PackageNotFoundError, version

from open_clip_ov2.openclip.version import check_open_clip

check_open_clip()

# The packages first: `ov2.train` and `ov2.evaluate` are the functions below.
import open_clip_ov2.evaluate  # noqa: E402
import open_clip_ov2.train  # noqa: E402, F401
from open_clip_ov2.core import CaptionLoss, CaptionModel, VisionModel, image_features  # noqa: E402
from open_clip_ov2.errors import Interrupted, RunFailed, UserError  # noqa: E402
from open_clip_ov2.openclip.models.open_model import create_caption_model  # noqa: E402
from open_clip_ov2.openclip.models.tokenizer import WordPieceTokenizer  # noqa: E402
from open_clip_ov2.openclip.patches import register, unregister  # noqa: E402
from open_clip_ov2.training import (  # noqa: E402
    caption,
    check,
    convert,
    evaluate,
    export,
    open_model,
    plan,
    push,
    train,
)

try:
    __version__ = version("open_clip_ov2")
except PackageNotFoundError:  # a checkout or a job's copy of the code, which is not installed
    __version__ = "unknown"
__all__ = [
    "CaptionLoss",
    "CaptionModel",
    "Interrupted",
    "RunFailed",
    "UserError",
    "VisionModel",
    "WordPieceTokenizer",
    "caption",
    "check",
    "convert",
    "create_caption_model",
    "evaluate",
    "export",
    "image_features",
    "open_model",
    "plan",
    "push",
    "register",
    "train",
    "unregister",
]

register()
