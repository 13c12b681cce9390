"""Any vision encoder as a vision model of transformers, which LLaVA's classes take as they are."""

from __future__ import annotations

from open_clip_ov2 import training
from open_clip_ov2.core import CaptionModel, VisionModel
from open_clip_ov2.errors import UserError
from open_clip_ov2.formats.encoder import Encoder
from open_clip_ov2.formats.llava import VisionTower, vision_tower


def open_tower(source: str, image_size: int | None = None) -> VisionTower:
    """The encoder `source`, in float32. Raises UserError.

    `source`: what `ov2 export` takes (a run's folder, a checkpoint, an exported folder, `hf-hub:NAME`, `NAME:TAG`).
    """
    loaded = training.open_model(source, image_size=image_size)
    if isinstance(loaded.model, (CaptionModel, VisionModel)):
        return vision_tower(Encoder.of(loaded.model.visual, loaded.preprocess_cfg))
    raise UserError(f"{source}: {type(loaded.model).__name__} cannot be the encoder of a LLaVA yet")
