"""Flags that need others or do not go with them, where OpenCLIP passes over them or fails: one-line errors instead."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from open_clip import list_models

from open_clip_ov2.argv import is_given
from open_clip_ov2.errors import UserError, first_line, nearest
from open_clip_ov2.openclip.command.flags import NATIVE, RunOptions
from open_clip_ov2.openclip.command.run_plan import StagePlan
from open_clip_ov2.openclip.models.factory import config_named, is_contrastive, is_ov2_model
from open_clip_ov2.openclip.models.own_config import brings_weights

COOLDOWN = "const-cooldown"
# Sharded by FSDP2: what has been tried, and is equal to DDP (tests/openclip/test_fsdp.py).
_OPTIMIZERS = ("adamw", "timm/adamw", "timm/muon")
_PRECISIONS = ("fp32", "amp_bf16", "amp_bfloat16", "pure_bf16")


def _is_coca(args: argparse.Namespace) -> bool:
    return "coca" in args.model.lower()  # what OpenCLIP's create_loss goes by


# Flags, what they have no effect without, and whether a stage has that.
_NEEDS: tuple[tuple[str, str, Callable[[argparse.Namespace], object]], ...] = (
    ("--lock-image-unlocked-groups --lock-image-freeze-bn-stats", "--lock-image", lambda args: args.lock_image),
    ("--lock-text-unlocked-layers --lock-text-freeze-layer-norm", "--lock-text", lambda args: args.lock_text),
    ("--distill-model", "--distill-pretrained", lambda args: args.distill_pretrained),
    ("--distill-pretrained", "--distill-model", lambda args: args.distill_model),
    ("--loss-dist-impl", "--siglip", lambda args: args.siglip),
    (
        "--epochs-cooldown --lr-cooldown-end --lr-cooldown-power",
        f"--lr-scheduler {COOLDOWN}",
        lambda args: args.lr_scheduler == COOLDOWN,
    ),
    ("--momentum", "--opt timm/NAME", lambda args: args.opt.lower() != "adamw"),
    ("--coca-caption-loss-weight", "a model with captions", lambda a: _is_coca(a) or is_ov2_model(a.model)),
    ("--coca-contrastive-loss-weight", "CoCa or ov1-of-NAME", lambda a: _is_coca(a) or is_contrastive(a.model)),
)


def check_needs(stages: Sequence[StagePlan]) -> None:
    """Raises UserError for a flag that has no effect in any stage."""
    for flags, needed, has in _NEEDS:
        given = [flag for flag in flags.split() if any(is_given(stage.argv, flag) for stage in stages)]
        if given and not any(has(stage.args) for stage in stages):
            raise UserError(f"{given[0]}: has no effect without {needed}; add that, or leave the flag out")


def check_model_name(flag: str, name: str) -> None:
    """Raises UserError for a model that there is not, or whose config cannot be read."""
    if ":" in name:
        try:
            config_named(name)
        except Exception as error:  # whatever upstream raises for a missing folder or a hub that cannot be reached
            raise UserError(f"{flag} {name}: its config cannot be read ({first_line(error)})") from error
    elif name not in list_models():
        if Path(name).is_dir():
            raise UserError(
                f"{flag} {name}: a folder; {flag} local-dir:{name} takes its model and weights, of a run the newest"
            )
        hint = nearest(name, list_models(), count=3)
        raise UserError(f"{flag} {name}: no such model{hint} (open_clip.list_models() lists them)")


def check_stock(args: argparse.Namespace) -> None:
    """Raises UserError for what ends in an assertion or an empty hand in OpenCLIP's `main`."""
    if args.logs.lower() == "none":
        raise UserError(f"--logs {args.logs}: a run is resumed from its folder, so it needs one; name a folder")
    config = config_named(args.model)
    from_hub = config.get("text_cfg", {}).get("hf_model_name")  # OpenCLIP frees the layer norms of such a text tower
    if args.lock_text and not args.lock_text_freeze_layer_norm and not from_hub:
        raise UserError("--lock-text: OpenCLIP freezes layer norms with the rest; add --lock-text-freeze-layer-norm")
    if args.opt.lower() != "adamw" and (args.beta1 is None) != (args.beta2 is None):
        raise UserError(f"--opt {args.opt}: timm takes --beta1 and --beta2, or neither")
    if args.lr_scheduler == COOLDOWN and args.epochs_cooldown is None:
        raise UserError(f"--lr-scheduler {COOLDOWN} needs --epochs-cooldown N")
    if args.pretrained_image and not config.get("vision_cfg", {}).get("timm_model_name"):
        raise UserError("--pretrained-image: OpenCLIP has weights for image towers of timm alone; use --pretrained")
    if args.siglip and _is_coca(args):
        raise UserError(f"--siglip: --model {args.model} has CoCa's loss; leave the flag out")
    if args.distill_model is not None:
        _check_distillation(args)


def _check_distillation(args: argparse.Namespace) -> None:
    check_model_name("--distill-model", args.distill_model)
    flag = f"--distill-model {args.distill_model}"
    if args.accum_freq > 1:
        raise UserError(f"{flag}: OpenCLIP does not accumulate gradients with it (--accum-freq {args.accum_freq})")
    if args.siglip or _is_coca(args):
        raise UserError(f"{flag}: OpenCLIP distills CLIP alone, by CLIP's loss; leave out --siglip and CoCa")
    if is_ov2_model(args.distill_model) or "coca" in args.distill_model.lower():
        raise UserError(f"{flag}: a teacher has features of images and texts; name a CLIP model")
    if ":" in args.distill_model and not brings_weights(args.distill_model):
        raise UserError(f"{flag}: it has no weights; name an architecture, and its weights by --distill-pretrained")


def check_fsdp(run: RunOptions, stages: Sequence[StagePlan], world_size: int) -> None:
    """Raises UserError for flags that do not go with --fsdp, or need it."""
    sharded = run.fsdp_checkpoint == "sharded"
    if not run.fsdp:
        for flag, given in (("--fsdp-hybrid", run.fsdp_hybrid), ("--fsdp-checkpoint", sharded)):
            if given:
                raise UserError(f"{flag} is for a sharded model; add --fsdp")
        return
    if run.fsdp_hybrid and world_size % run.fsdp_hybrid:
        raise UserError(f"--fsdp-hybrid {run.fsdp_hybrid}: does not divide the {world_size} processes of the run")
    for stage in stages:
        args, options = stage.args, stage.options
        whole_blocks = options.fp8 or options.compile_encoder != "blocks"
        without_shards = "leave out --fsdp-checkpoint sharded"
        for name, value, known in (("precision", args.precision, _PRECISIONS), ("opt", args.opt.lower(), _OPTIMIZERS)):
            if value not in known:
                raise UserError(f"--fsdp --{name} {value}: expected one of {', '.join(known)}")
        for refused, problem in (
            (args.ddp_static_graph, "--ddp-static-graph with --fsdp: it is DDP's"),
            (args.distill_model, "--distill-model with --fsdp: the teacher would be sharded too"),
            (options.aspect == NATIVE, "--fsdp --aspect native: images of any shape go through parts of a block"),
            (whole_blocks, "--fsdp gathers a block at a time: leave out --fp8 and --compile-encoder"),
            (sharded and args.remote_sync, f"--remote-sync copies files; {without_shards}, or --remote-sync"),
            (sharded and args.save_most_recent, f"--save-most-recent leads to a file; {without_shards}"),
            (sharded and options.lora_rank, f"--lora-rank: checkpoints have adapters merged; {without_shards}"),
        ):
            if refused:
                raise UserError(problem)
