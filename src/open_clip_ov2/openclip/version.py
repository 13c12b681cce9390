"""Which OpenCLIP this plugin was checked with, and what is where in which version.

| | 3.3 | main (4.2.0.dev0) |
|---|---|---|
| training | `open_clip_train.main`, `.train`, `.data` | the same names in `legacy_main`, `legacy_train`, `legacy_data`; `main` has tasks |
| attention of a block | `torch.nn.MultiheadAttention`, made faster by core/vit_fast.py | `open_clip.transformer.Attention`, as it is |
| `CoCa.forward` | `output_labels` | without |
| `set_grad_checkpointing` | `(enable)` | `(enable, impl)` |
"""

from __future__ import annotations

import logging

import open_clip

logger = logging.getLogger("open_clip_ov2")

CHECKED = "3.3"
LATER = "4.2.0.dev0, commit 89fb801"  # by scripts/check_openclip.py; docs/openclip.md has the table
OLDEST, BELOW = (3, 3), (5,)


def check_open_clip() -> str:
    """The version of open_clip in use; a warning for one later than CHECKED. Raises ImportError, with what to do, for
    one that is out of range."""
    found: str = open_clip.__version__
    number = tuple(int(part) for part in found.split(".")[:2])
    if not OLDEST <= number < BELOW:
        raise ImportError(
            f"open_clip_ov2 works with open_clip_torch >= {CHECKED}, < {BELOW[0]}, and found {found}: "
            f"pip install 'open_clip_torch[training]=={CHECKED}.*'"
        )
    if number != OLDEST:
        logger.warning(
            "open_clip_torch %s: loading, embedding, captioning, evaluation and export were checked with %s; encoders "
            "run OpenCLIP's own attention, and training needs %s",
            found, LATER, CHECKED,
        )  # fmt: skip
    return found


def check_can_train() -> None:
    """Raises ImportError, with what to do, for an OpenCLIP whose training code is another."""
    if not open_clip.__version__.startswith(f"{CHECKED}."):
        raise ImportError(
            f"training needs open_clip_torch {CHECKED}.x, and found {open_clip.__version__}: "
            f"pip install 'open_clip_torch[training]=={CHECKED}.*'"
        )


def missing_name(name: str) -> ImportError:
    """The error, in one line, for a name that this plugin needs and that the installed version lacks."""
    top = name.split(".")[0]
    package = f"open_clip_torch[training]=={CHECKED}.*" if top.startswith("open_clip") else top
    return ImportError(
        f"open_clip_ov2 needs {name}, which the installed version does not have; pip install --upgrade '{package}'"
    )
