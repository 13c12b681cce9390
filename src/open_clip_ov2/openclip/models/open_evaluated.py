"""Opens any model for evaluation, with the transform that it is evaluated with; and `pixels:16`, gray pixels in place
of an encoder, the floor under all that is learned.

Shapes: B batch, D width (core/__init__.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from open_clip_ov2.core import CaptionModel, VisionModel
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.eval_model import EvalModel
from open_clip_ov2.openclip.models.eval_models import NO_TEXT, FeatureModel, as_eval_model
from open_clip_ov2.openclip.models.open_model import LoadedModel, open_model
from open_clip_ov2.openclip.models.preprocess import eval_transform, native_budget
from open_clip_ov2.openclip.models.tokenizer import eos_id_of
from open_clip_ov2.openclip.models.weights import TABLE_TOLERANCE

PIXELS = "pixels:"
LARGEST = 256  # px; larger images are no small features


def gray_pixels(image: Any, side: int) -> Tensor:
    """PIL image -> `(1, side, side)` float32, 0 to 1: the whole image, squeezed into a square of `side` px."""
    small = image.convert("L").resize((side, side), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small, dtype=np.float32))[None] / 255


class Pixels(nn.Module):
    """Features are the pixels less their mean, so that cosine similarity is their correlation."""

    visual = None

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """`(B, 1, side, side)` -> `(B, D)`."""
        pixels_BD = image.flatten(1)
        pixels_BD = pixels_BD - pixels_BD.mean(dim=1, keepdim=True)
        return nn.functional.normalize(pixels_BD, dim=-1) if normalize else pixels_BD


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
    if source.startswith(PIXELS):
        return _gray_pixels(source, Compute(device, "fp32", world_size, NO_TEXT), aspect)
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


def _gray_pixels(source: str, compute: Compute, aspect: str | None) -> EvalModel:
    side = source.removeprefix(PIXELS)
    if not side.isdecimal() or not 1 <= int(side) <= LARGEST:
        raise UserError(f"{source!r}: expected pixels:SIDE, SIDE in px from 1 to {LARGEST}")
    if aspect == "native":
        raise UserError(f"--aspect native: {source} compares images of one shape")
    return FeatureModel(Pixels(), None, compute, source, preprocess=partial(gray_pixels, side=int(side)))
