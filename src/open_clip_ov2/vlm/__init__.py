"""From an encoder to a multimodal model: LLaVA's recipes on TRL's SFTTrainer (`ov2 vlm`).

A run is a list of stages (`vlm_recipe.py`) over LLaVA's JSON (`conversations.py`). `assemble.py` puts encoder,
projector and language model together; each stage opens the model of the stage before and writes its own
(`vlm_run.py`), so that in the end the run's folder is a model that transformers opens. Importing this package imports
neither transformers nor TRL.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from open_clip_ov2.errors import UserError

if TYPE_CHECKING:
    from open_clip_ov2.vlm.vlm_options import VlmPlan


def load() -> None:
    """Import what training needs (seconds). Raises UserError if it is not installed."""
    try:
        import open_clip_ov2.vlm.vlm_run  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"ov2 vlm train needs {error.name}: pip install 'open_clip_ov2[vlm]' (Python 3.11 or newer)"
        ) from error


def train(plan: VlmPlan) -> Path:
    """`vlm_run.train`."""
    load()
    from open_clip_ov2.vlm.vlm_run import train as run

    return run(plan)
