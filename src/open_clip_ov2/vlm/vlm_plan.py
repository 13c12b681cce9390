"""What a run of `ov2 vlm train` will do: steps, memory, hours and commands, before anything is trained."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from open_clip_ov2.argv import Parser, without
from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe.costs import Machine, Plan, StageCost
from open_clip_ov2.vlm.vlm_costs import plan_costs, samples_of
from open_clip_ov2.vlm.vlm_options import VlmPlan, add_train_flags, plan_of

ENCODER = "ov2-vit-l-14"  # of `ov2 plan --vlm` without one


def plan_of_recipe(recipe: str, flags: Sequence[str]) -> VlmPlan:
    """Of `ov2 plan --vlm RECIPE`, with flags of `ov2 vlm train`; encoder and --out may be missing. Raises UserError."""
    parser = Parser(prog="ov2 vlm train")
    add_train_flags(parser, needs_encoder=False)
    argv = [*flags, "--recipe", recipe]
    parsed = parser.parse_args(argv)
    if parsed.encoder is None:
        parsed.encoder, argv = ENCODER, [ENCODER, *argv]
    if parsed.out is None:
        parsed.out = Path("vlm") / Path(recipe).name.removesuffix(".toml")
        argv += ["--out", str(parsed.out)]
    return plan_of(parsed, argv, needs_data=False)


def described(plan: VlmPlan) -> list[str]:
    """Lines for `--dry-run`."""
    world_size = plan.options.gpus or 1
    start = commands(plan, world_size)
    lines = [
        f"folder          {plan.folder}",
        f"encoder         {plan.encoder}, layer {plan.recipe.feature_layer}, projector {plan.recipe.projector}",
        f"language model  {plan.language_model}, chat template {plan.recipe.chat_template}",
    ]
    try:
        found = plan_costs(plan, Machine(world_size))
        costs, start = [_costs(cost) for cost in found.stages], fitting_commands(plan, found)
    except UserError as error:
        costs = [f"memory and hours are unknown: {error}"] * len(plan.recipe.stages)
    for number, stage in enumerate(plan.recipe.stages, 1):
        samples, (batch, accumulation) = samples_of(plan, stage), plan.accumulation(stage, world_size)
        times = f" x {accumulation} accumulated" if accumulation > 1 else ""
        lines += [
            f"stage {number}         {stage.summary}",
            f"                {samples:,} samples, {stage.steps(samples):,} steps: {batch} on each of {world_size} "
            f"process{'es' if world_size > 1 else ''}{times}, template {stage.template}",
            f"                {costs[number - 1]}",
        ]
    return [*lines, "", *start, "dry run: nothing was written or trained"]


def _costs(cost: StageCost) -> str:
    used = f"about {cost.memory.of(cost.batch_size) / 1e9:,.0f} GB on each GPU (an H100 has {cost.machine.memory_gb:g})"
    return f"{cost.hours:.1f} hours, {cost.memory_advice().partition(': ')[2] or used}"


def fitting_commands(plan: VlmPlan, costs: Plan) -> list[str]:
    """How to start it; where it does not fit into the GPUs' memory, how to start it so that it does, if sharding and
    recomputation are enough."""
    gpus, options = costs.machine.gpus, plan.options
    if gpus == 1 or all(cost.fits for cost in costs.stages):
        return commands(plan, gpus)
    smaller = replace(plan, options=replace(options, grad_checkpointing=True))
    found = plan_costs(smaller, costs.machine, sharded=True)
    if not all(cost.fits for cost in found.stages):
        return commands(plan, gpus)
    needed = max(cost.memory.of(cost.batch_size) for cost in found.stages) / 1e9
    more = [] if options.trainer else ["--trainer", "fsdp.toml"]
    more += [] if options.grad_checkpointing else ["--grad-checkpointing"]
    return [
        f"# weights split over the GPUs, activations recomputed: {needed:,.0f} GB on each, {found.hours:.1f} hours",
        f"# in {options.trainer}, at its top: fsdp = true" if options.trainer else "echo 'fsdp = true' > fsdp.toml",
        *commands(replace(plan, argv=(*plan.argv, *more)), gpus),
    ]


def commands(plan: VlmPlan, world_size: int) -> list[str]:
    """How to start it: on this machine, and on SLURM."""
    words = [word for word in without(plan.argv, ("--gpus",)) if word != "--dry-run"]
    missing = [name for name in plan.data_names if getattr(plan.options, f"{name}_data") is None]
    data = " ".join(f"--{name}-data FILE --{name}-images FOLDER" for name in missing)
    train = f"{shlex.join(['vlm', 'train', *words])} {data}".strip()
    if world_size == 1:
        return [f"ov2 {train}"]
    nodes, gpus = (world_size // 8, 8) if world_size % 8 == 0 else (1, world_size)  # 8 GPUs a node, as most have
    here = [f"torchrun --nproc-per-node {gpus} -m open_clip_ov2 -- {train}"] if nodes == 1 else []
    return [*here, f"ov2 submit --nodes {nodes} --gpus-per-node {gpus} -- {train}"]
