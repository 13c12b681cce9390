"""Everything about a run that can be checked before it starts, on a machine that need not be the one it runs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import open_clip
import torch

from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.command.parse import parse
from open_clip_ov2.openclip.command.run_config import signature
from open_clip_ov2.openclip.command.run_plan import RunPlan, StagePlan
from open_clip_ov2.openclip.run.loaders import dataset_type, make_source, samples_per_epoch
from open_clip_ov2.openclip.run.stage_model import model_options


@dataclass(frozen=True)
class CheckedRun:
    """`parameters` of the model, `total_samples` over all stages; `signature` of the run's configuration."""

    plan: RunPlan
    signature: str
    total_samples: int
    parameters: int


def check_train(argv: Sequence[str], world_size: int, gpu: bool | None = None) -> CheckedRun:
    """Flags parsed, recipe read, data found, model made on the meta device. Raises UserError.

    `world_size` and `gpu` are what the run will have, not what this machine has.
    """
    plan = parse(argv, world_size, gpu)
    samples = sum(_check_data(stage, world_size) for stage in plan.stages)
    parameters = [_check_model(stage) for stage in plan.stages]
    return CheckedRun(plan, signature(plan.config), samples, parameters[-1])


def _check_data(stage: StagePlan, world_size: int) -> int:
    """Samples that the stage will see."""
    args, samples = stage.args, 0
    if args.train_data or args.dataset_type == "synthetic":
        kind = dataset_type(args.train_data or "", args.dataset_type)
        source = make_source(args.train_data or "", kind, args, stage.options, train=True)
        source.check_consumers(max(1, args.workers) * world_size)
        samples = samples_per_epoch(args, source) * args.epochs
    if args.val_data:
        kind = dataset_type(args.val_data, "auto" if args.dataset_type == "synthetic" else args.dataset_type)
        make_source(args.val_data, kind, args, stage.options, train=False)
    return samples


def _check_model(stage: StagePlan) -> int:
    """Number of its parameters."""
    args = stage.args
    options = model_options(stage.options, args.model, args.force_context_length)
    size = args.force_image_size
    size = size[0] if isinstance(size, list) and len(size) == 1 else size
    try:
        with torch.device("meta"):
            model = open_clip.create_model(
                args.model, device="meta", force_image_size=size, force_context_length=args.force_context_length,
                **options,
            )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--model {args.model}: {str(error).splitlines()[0]}") from error
    return sum(parameter.numel() for parameter in model.parameters())
