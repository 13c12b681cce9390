"""Which OpenCLIP this plugin was checked with, and what is where in which version.

| | 3.3 | 4.2.0.dev0 |
|---|---|---|
| training | `open_clip_train.main`, `.train`, `.data` | `.legacy_main`, `.legacy_train`, `.legacy_data` |
| attention of a block (core/vit_fast.py) | `torch.nn.MultiheadAttention` | `open_clip.transformer.Attention` |
| `CoCa.forward` (models/related.py) | has `output_labels` | one more row of logits instead |
| `set_grad_checkpointing` | `(enable)` | `(enable, impl)` |
"""

from __future__ import annotations

import logging
import re

import open_clip

from open_clip_ov2.errors import UserError

logger = logging.getLogger("open_clip_ov2")

CHECKED = "3.3"
LATER = "4.2.0.dev0 (89fb801)"  # by scripts/check_openclip.py; docs/openclip.md has the table
OLDEST, BELOW = (3, 3), (5,)


def check_open_clip() -> str:
    """The version of open_clip in use; a warning for one later than CHECKED. Raises ImportError, with what to do, for
    one that is out of range."""
    found: str = open_clip.__version__
    number = tuple(map(int, re.findall(r"\d+", found)[:2]))
    if not OLDEST <= number < BELOW:
        raise ImportError(
            f"open_clip_ov2 works with open_clip_torch >= {CHECKED}, < {BELOW[0]}, and found {found}: "
            f"pip install 'open_clip_torch[training]=={CHECKED}.*'"
        )
    if number != OLDEST:
        logger.warning(
            "open_clip_torch %s is installed: loading, embedding, captioning, evaluation and export were checked with "
            "%s and %s, training with %s alone",
            found, CHECKED, LATER, CHECKED,
        )  # fmt: skip
    return found


def check_can_train() -> None:
    """Raises UserError for an OpenCLIP whose training code is another."""
    if not open_clip.__version__.startswith(f"{CHECKED}."):
        raise UserError(
            f"open_clip_torch {open_clip.__version__} is installed, and training was checked with {CHECKED} alone: "
            f"pip install 'open_clip_torch[training]=={CHECKED}.*'"
        )


def missing_name(name: str) -> ImportError:
    """The error, in one line, for a name that this plugin needs and that the installed version lacks."""
    top = name.split(".")[0]
    package = f"open_clip_torch[training]=={CHECKED}.*" if top.startswith("open_clip") else top
    return ImportError(
        f"open_clip_ov2 needs {name}, which the installed version does not have; pip install --upgrade '{package}'"
    )
