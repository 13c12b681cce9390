"""Flags that go with --fsdp, and those that do not: one-line errors."""

from __future__ import annotations

from collections.abc import Sequence

from open_clip_ov2.argv import is_given
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.command.flags import RunOptions
from open_clip_ov2.openclip.command.run_plan import StagePlan

# Sharded by FSDP2: what has been tried, and is equal to DDP (tests/openclip/test_fsdp.py).
_FSDP_OPTIMIZERS = ("adamw", "timm/adamw", "timm/muon")
_FSDP_PRECISIONS = ("fp32", "amp_bf16", "amp_bfloat16", "pure_bf16")
_REFUSED = {"--ddp-static-graph": "it is DDP's", "--distill-model": "the teacher would be sharded too"}


def check_fsdp(run: RunOptions, stages: Sequence[StagePlan], world_size: int) -> None:
    """Raises UserError for flags that do not go with --fsdp, or need it."""
    if not run.fsdp:
        for flag, value in (("--fsdp-hybrid", run.fsdp_hybrid), ("--fsdp-checkpoint", run.fsdp_checkpoint != "full")):
            if value:
                raise UserError(f"{flag} is for a sharded model; add --fsdp")
        return
    if run.fsdp_hybrid and world_size % run.fsdp_hybrid:
        raise UserError(f"--fsdp-hybrid {run.fsdp_hybrid}: does not divide the {world_size} processes of the run")
    for stage in stages:
        args = stage.args
        for flag, why in _REFUSED.items():
            if is_given(stage.argv, flag):
                raise UserError(f"{flag} with --fsdp: {why}")
        if args.precision not in _FSDP_PRECISIONS:
            raise UserError(f"--fsdp --precision {args.precision}: expected one of {', '.join(_FSDP_PRECISIONS)}")
        if args.opt.lower() not in _FSDP_OPTIMIZERS:
            raise UserError(f"--fsdp --opt {args.opt}: expected one of {', '.join(_FSDP_OPTIMIZERS)}")
        if stage.options.aspect not in (None, "square"):
            raise UserError(f"--fsdp --aspect {stage.options.aspect}: images of any shape go through parts of a block")
        if stage.options.fp8 or stage.options.compile_encoder != "blocks":
            raise UserError("--fsdp gathers a block at a time: leave out --fp8 and --compile-encoder")
        if args.remote_sync and run.fsdp_checkpoint == "sharded":
            raise UserError("--remote-sync copies files; leave out --fsdp-checkpoint sharded, or --remote-sync")
        if args.save_most_recent and run.fsdp_checkpoint == "sharded":
            raise UserError("--save-most-recent leads to a file; leave out --fsdp-checkpoint sharded")
        if stage.options.lora_rank and run.fsdp_checkpoint == "sharded":
            raise UserError(
                "--lora-rank: checkpoints have adapters merged, which shards cannot; leave out --fsdp-checkpoint"
            )
