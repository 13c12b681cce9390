"""Memory that a stage will need of a GPU, and its FLOPs, from its arguments by the formulas of `recipe`."""

from __future__ import annotations

from dataclasses import replace

from open_clip.factory import get_model_config

from open_clip_ov2.openclip.command.run_plan import StagePlan
from open_clip_ov2.openclip.models.model_facts import ModelFacts, model_facts
from open_clip_ov2.recipe.costs import Settings, count_tokens
from open_clip_ov2.recipe.flops import CaptionSizes, flops
from open_clip_ov2.recipe.memory import PRECISION, Memory, activation_bytes, fixed_bytes, loss_bytes


def stage_memory(stage: StagePlan, world_size: int) -> Memory:
    """Raises UserError."""
    facts, size, settings = _looked_up(stage, world_size)
    tokens = count_tokens(facts.sizes, size, settings)
    if isinstance(facts.sizes, CaptionSizes):  # of a range of ratios the largest counts
        tokens = replace(tokens, kept=int((tokens.encoder - 1) * settings.keep[1]))
    precision = PRECISION[settings.precision]
    return Memory(
        fixed_bytes(facts.trained, facts.frozen, precision, world_size) + loss_bytes(facts.sizes, precision),
        activation_bytes(facts.sizes, tokens, size, precision, grad_checkpointing=settings.grad_checkpointing),
    )


def stage_flops(stage: StagePlan) -> float:
    """Forward and backward of one image, at a full caption. Raises UserError."""
    facts, size, settings = _looked_up(stage, 1)
    tokens = count_tokens(facts.sizes, size, settings)
    return sum(part.total for part in flops(facts.sizes, facts.sizes.encoder.patches(size), tokens).values())


def _looked_up(stage: StagePlan, world_size: int) -> tuple[ModelFacts, int, Settings]:
    """The model's facts, the stage's resolution and settings."""
    args, options = stage.args, stage.options
    size = args.force_image_size or (get_model_config(args.model) or {}).get("vision_cfg", {}).get("image_size")
    size = size[0] if isinstance(size, list) else size
    facts = model_facts(
        args.model,
        resolution=size,
        context_length=args.force_context_length,
        tokenizer=options.tokenizer,
        fusion=options.fusion,
    )
    keep = (options.keep_ratio.low, options.keep_ratio.high) if options.keep_ratio else facts.keep_ratio or (1.0, 1.0)
    dropout = args.force_patch_dropout
    settings = Settings(
        global_batch=args.batch_size * args.accum_freq * world_size,
        batch_size=args.batch_size,
        accum_freq=args.accum_freq,
        lr=args.lr,
        warmup_steps=args.warmup,
        precision=args.precision,
        grad_checkpointing=args.grad_checkpointing,
        context_length=facts.context_length,
        keep=keep,
        patch_dropout=facts.patch_dropout if dropout is None else dropout,
        mean_caption_tokens=None,
    )
    return facts, size, settings
