"""What a run of `ov2 vlm train` will do: steps and commands, before anything is downloaded or trained."""

from __future__ import annotations

import shlex

from open_clip_ov2.argv import without
from open_clip_ov2.errors import UserError
from open_clip_ov2.vlm.conversations import read_rows
from open_clip_ov2.vlm.vlm_options import VlmPlan
from open_clip_ov2.vlm.vlm_recipe import VlmStage


def samples_of(plan: VlmPlan, stage: VlmStage) -> int:
    """Rows of the stage's file or, if it was not given, of its published data. Raises UserError."""
    file = getattr(plan.options, f"{stage.data}_data")
    if file is not None and file.is_file():
        return len(read_rows(file))
    if stage.samples is None:
        raise UserError(
            f"--{stage.data}-data is missing: recipe {plan.options.recipe} does not say how many rows it has"
        )
    return stage.samples


def described(plan: VlmPlan) -> list[str]:
    """Lines for `--dry-run`."""
    world_size = plan.options.gpus or 1
    lines = [
        f"folder          {plan.folder}",
        f"encoder         {plan.encoder}, layer {plan.recipe.feature_layer}, projector {plan.recipe.projector}",
        f"language model  {plan.language_model}, chat template {plan.recipe.chat_template}",
    ]
    for number, stage in enumerate(plan.recipe.stages, 1):
        samples, (batch, accumulation) = samples_of(plan, stage), plan.accumulation(stage, world_size)
        times = f" x {accumulation} accumulated" if accumulation > 1 else ""
        lines += [
            f"stage {number}         {stage.summary}",
            f"                {samples:,} samples, {stage.steps(samples):,} steps: {batch} on each of {world_size} "
            f"process{'es' if world_size > 1 else ''}{times}, template {stage.template}",
        ]
    return [*lines, "", *commands(plan, world_size), "dry run: nothing was written or trained"]


def commands(plan: VlmPlan, world_size: int) -> list[str]:
    """How to start it: on this machine, and on SLURM."""
    words = [word for word in without(plan.argv, ("--gpus",)) if word != "--dry-run"]
    missing = [name for name in plan.data_names if getattr(plan.options, f"{name}_data") is None]
    data = " ".join(f"--{name}-data FILE --{name}-images FOLDER" for name in missing)
    train = f"{shlex.join(['vlm', 'train', *words])} {data}".strip()
    if world_size == 1:
        return [f"ov2 {train}"]
    nodes, gpus = max(1, world_size // 8), min(world_size, 8)  # 8 GPUs a node, as most have
    return [
        f"torchrun --nproc-per-node {gpus} -m open_clip_ov2 {train}" if nodes == 1 else "",
        f"ov2 submit --nodes {nodes} --gpus-per-node {gpus} -- {train}",
    ][nodes > 1 :]
