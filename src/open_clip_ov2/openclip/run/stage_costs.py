"""What a stage of a run costs, from its parsed flags: for `ov2 plan`, the memory check of `ov2 submit`, comparisons at
equal FLOPs, and the MFU of a run that trains."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.command.flags import NATIVE
from open_clip_ov2.openclip.command.run_plan import RunPlan, StagePlan
from open_clip_ov2.openclip.models.model_facts import ModelFacts, facts_of, model_facts
from open_clip_ov2.recipe import model_costs
from open_clip_ov2.recipe.costs import Machine, Plan, StageCost, baseline_flops
from open_clip_ov2.recipe.model_costs import Tokens
from open_clip_ov2.tracking.throughput import Meter, peak_of

logger = logging.getLogger("open_clip_ov2")


def plan_costs(plan: RunPlan, machine: Machine, mean_caption_tokens: float | None = None) -> Plan:
    """The costs of every stage of a run. Raises UserError for a model that is not made of plain transformers, or a
    stage of unknown length."""
    costs, others = [], []
    for stage in plan.stages:
        facts = stage_facts(stage)
        if not stage.args.train_num_samples:
            raise UserError("the length of the run is unknown; give --train-num-samples, --stage or a recipe")
        speed = machine.speed(stage.index, len(plan.stages))
        costs.append(stage_cost(stage, facts, machine, speed, mean_caption_tokens, plan.shards(machine.gpus)))
        others.append(baseline_flops(facts.sizes, costs[-1]) if facts.sizes.is_ov2 else {})
    baselines = {name: tuple(each[name] for each in others) for name in others[0]}
    return Plan(plan.model, facts.parameters, tuple(costs), baselines, machine)


def stage_facts(stage: StagePlan) -> ModelFacts:
    """The model of a stage, built without memory. Raises UserError."""
    args = stage.args
    facts = model_facts(
        args.model,
        resolution=stage.image_size,
        context_length=args.force_context_length,
        patch_dropout=args.force_patch_dropout,
        tokenizer=stage.options.tokenizer,
        **stage.options.model_options(),
    )
    return _with_budget(stage, facts)


def _with_budget(stage: StagePlan, facts: ModelFacts) -> ModelFacts:
    """With the patches that an image has at most under --aspect native."""
    if stage.options.aspect != NATIVE:
        return facts
    encoder = replace(facts.sizes.encoder, budget=stage.options.max_tokens)
    return replace(facts, sizes=replace(facts.sizes, encoder=encoder))


def stage_cost(
    stage: StagePlan,
    facts: ModelFacts,
    machine: Machine,
    speed: float | None = None,
    mean_caption_tokens: float | None = None,
    shards: int = 1,
) -> StageCost:
    """`speed`: measured images per second of one GPU; `mean_caption_tokens`: real tokens of a caption, end of text
    included, by default all positions; `shards`: processes that share one copy of the model. Raises UserError."""
    args, resolution = stage.args, facts.resolution
    tokens = facts.tokens(mean_caption_tokens)
    budget = facts.sizes.encoder.budget
    images = f"{resolution} px" if budget is None else f"{budget} tokens"
    return StageCost(
        title=stage.title or images,
        images=images,
        resolution=resolution,
        samples=(args.train_num_samples or 0) * args.epochs,
        tokens=tokens,
        batch_size=args.batch_size,
        accum_freq=args.accum_freq,
        lr=args.lr,
        warmup_steps=args.warmup,
        precision=args.precision,
        grad_checkpointing=args.grad_checkpointing,
        context_length=facts.context_length,
        parts=model_costs.flops(facts.sizes, resolution, tokens),
        memory=_memory(stage, facts, tokens, machine.gpus, shards),
        machine=machine,
        speed=speed,
        remedy="--grad-checkpointing" if shards > 1 or machine.gpus == 1 else "--fsdp, --grad-checkpointing",
    )


def _memory(stage: StagePlan, facts: ModelFacts, tokens: Tokens, gpus: int, shards: int) -> model_costs.Memory:
    sizes, precision = facts.sizes, model_costs.PRECISION[stage.args.precision]
    # Of a range of keep ratios the largest one needs the most memory.
    kept = int((tokens.encoder - 1) * facts.keep_ratio[1]) if facts.keep_ratio else tokens.kept
    if shards == 1:
        fixed = model_costs.fixed_bytes(facts.trained, facts.frozen, precision, gpus)
    else:
        fixed = model_costs.sharded_bytes(sizes, facts.trained, facts.frozen, precision, shards)
    activations = model_costs.activation_bytes(
        sizes, replace(tokens, kept=kept), facts.resolution, precision, grad_checkpointing=stage.args.grad_checkpointing
    )
    return model_costs.Memory(fixed + model_costs.loss_bytes(sizes, precision), activations)


def image_flops(facts: ModelFacts) -> Callable[[float | None], float]:
    """FLOPs of forward and backward of one image, as a function of its caption's real target tokens. An ov2 model
    computes that many positions and no padding. CoCa and CLIP compute their whole context whatever the caption, as does
    an ov2 model for None."""
    whole = facts.tokens()

    def of(targets: float | None) -> float:
        length = whole.text if targets is None or not facts.sizes.is_ov2 else targets
        return model_costs.total_flops(facts.sizes, facts.resolution, replace(whole, text=length, targets=length))

    return of


def stage_meter(model: Any, stage: StagePlan, device: torch.device, world_size: int) -> Meter | None:
    """What MFU is computed with. None, and a line in the log, where FLOPs are not known: towers that are not plain
    transformers, or are frozen."""
    args = stage.args
    if args.lock_image or args.lock_text or stage.options.freeze or stage.options.lora_rank:
        logger.info("MFU is not measured: a part of the model is frozen")
        return None
    try:
        facts = _with_budget(stage, facts_of(args.model, model))
    except (UserError, AttributeError) as error:
        logger.info("MFU is not measured: %s", error)
        return None
    peak = peak_of(device, args.precision)
    logger.info(
        "MFU is relative to %.4g TFLOP/s per device (%s, dense matrix products, %s)",
        peak.flops / 1e12, peak.source, args.precision,
    )  # fmt: skip
    return Meter(image_flops(facts), peak.flops * world_size)
