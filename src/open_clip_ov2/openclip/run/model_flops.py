"""Model FLOPs of what a run or a benchmark really trains on: images of its resolution, captions as long as they are."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.models.model_facts import ModelFacts, facts_of
from open_clip_ov2.recipe.costs import count_tokens, resolve
from open_clip_ov2.recipe.flops import CaptionSizes, flops
from open_clip_ov2.recipe.stage import Stage
from open_clip_ov2.tracking.peak import peak_of
from open_clip_ov2.tracking.throughput import Meter

logger = logging.getLogger("open_clip_ov2")


def image_flops(facts: ModelFacts, resolution: int, batch_size: int = 1) -> Callable[[float | None], float]:
    """Forward and backward of one image, as a function of its caption's real target tokens.

    An ov2 model needs that many positions and no padding. CoCa and CLIP compute their whole context whatever the
    caption, as does an ov2 model for None.
    """
    settings = resolve(Stage(resolution, batch_size), {}, 1, **facts.settings())
    whole, patches = count_tokens(facts.sizes, resolution, settings), facts.sizes.encoder.patches(resolution)

    def of_length(length: int) -> float:
        tokens = replace(whole, text=length, targets=float(length))
        return sum(part.total for part in flops(facts.sizes, patches, tokens).values())

    everything = sum(part.total for part in flops(facts.sizes, patches, whole).values())

    def of(targets: float | None) -> float:
        if targets is None or not isinstance(facts.sizes, CaptionSizes):
            return everything
        low = math.floor(targets)
        share = targets - low  # between two whole numbers: the attention's square hardly bends there
        return (1 - share) * of_length(low) + share * of_length(low + 1)

    return of


def stage_meter(model: Any, args: argparse.Namespace) -> Meter | None:
    """None, and a line in the log, where FLOPs are not known: towers that are no plain transformers, or frozen."""
    if args.lock_image or args.lock_text:
        logger.info("MFU is not measured: a part of the model is frozen")
        return None
    try:
        facts = facts_of(args.model, model)
    except (UserError, AttributeError) as error:
        logger.info("MFU is not measured: %s", error)
        return None
    peak = peak_of(torch.device(args.device), args.precision)
    logger.info(
        "MFU is relative to %.4g TFLOP/s per device (%s, dense matrix products, %s)",
        peak.flops / 1e12, peak.source, args.precision,
    )  # fmt: skip
    return Meter(image_flops(facts, int(model.visual.image_size[0])), peak.flops * args.world_size)
