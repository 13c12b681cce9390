"""Opens any model for evaluation, with the transform that it is evaluated with."""

from __future__ import annotations

from typing import Any

import torch

from open_clip_ov2.core import CaptionModel, VisionModel
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.eval_model import EvalModel
from open_clip_ov2.openclip.models.encoders import Pixels, pixel_preprocess
from open_clip_ov2.openclip.models.eval_models import NO_TEXT, FeatureModel, as_eval_model
from open_clip_ov2.openclip.models.open_model import LoadedModel, open_model
from open_clip_ov2.openclip.models.preprocess import eval_transform, native_budget
from open_clip_ov2.openclip.models.tokenizer import eos_id_of
from open_clip_ov2.openclip.models.weights import TABLE_TOLERANCE


def open_eval_model(
    source: str,
    device: torch.device,
    world_size: int = 1,
    *,
    image_size: int | None = None,
    aspect: str | None = None,
    max_tokens: int | None = None,
) -> EvalModel:
    """Any model that `open_model` opens, or `pixels:SIDE`, under evaluation in float32; images keep their shapes with
    an `aspect` of "native", or if the model was trained so. Raises UserError."""
    if (gray := pixel_preprocess(source)) is not None:
        if aspect == "native":
            raise UserError(f"--aspect native: {source} compares images of one shape")
        return FeatureModel(Pixels(), None, Compute(device, "fp32", world_size, NO_TEXT), source, preprocess=gray)
    run = open_model(source, str(device), image_size=image_size)
    if isinstance(run.model, CaptionModel):
        eos_id = run.model.text_config.eos_id
    else:
        eos_id = NO_TEXT if isinstance(run.model, VisionModel) else eos_id_of(run.tokenizer)
    preprocess = _native(run, aspect, max_tokens, image_size is not None) or run.preprocess
    return as_eval_model(
        run.model,
        run.tokenizer,
        Compute(device, "fp32", world_size, eos_id),
        name=source,
        preprocess=preprocess,
        checkpoint=run.checkpoint,
        reopen=lambda size: open_eval_model(source, device, world_size, image_size=size, aspect=aspect),
    )


def _native(run: LoadedModel, aspect: str | None, max_tokens: int | None, resized: bool) -> Any:
    """The transform that keeps the shape of images; None for squares. A model at another resolution (`resized`) has the
    budget of that. Raises UserError."""
    native = aspect == "native" or (aspect is None and run.max_tokens is not None)
    if not native and max_tokens is not None:
        raise UserError("--max-tokens is the budget of images that keep their shapes; add --aspect native")
    if not native:
        return None
    model = run.model
    if not isinstance(model, (CaptionModel, VisionModel)):
        raise UserError(f"--aspect native: {run.checkpoint} is not an ov2 model, and takes images of one shape")
    table = model.visual.positional_embedding
    if not torch.allclose(table.float(), model.position_table(), atol=TABLE_TOLERANCE):
        raise UserError(f"--aspect native: {run.checkpoint} has a table of positions of its own, for one shape alone")
    return eval_transform(run.preprocess_cfg, native_budget(model, max_tokens or (None if resized else run.max_tokens)))
