"""Flags that need others or do not go with them, where OpenCLIP passes over them or fails: one-line errors instead."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from open_clip import list_models

from open_clip_ov2.errors import UserError, first_line, nearest
from open_clip_ov2.openclip.command.flags import RunOptions
from open_clip_ov2.openclip.command.refusals import COOLDOWN, is_coca
from open_clip_ov2.openclip.command.run_plan import StagePlan
from open_clip_ov2.openclip.models.factory import config_named, is_ov2_model
from open_clip_ov2.openclip.models.own_config import brings_weights

# Sharded by FSDP2: what has been tried, and is equal to DDP (tests/openclip/test_fsdp.py).
_OPTIMIZERS = ("adamw", "timm/adamw", "timm/muon")
_PRECISIONS = ("fp32", "amp_bf16", "amp_bfloat16", "pure_bf16")


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
    # OpenCLIP frees the layer norms of a text tower from the hub.
    from_hub = config_named(args.model).get("text_cfg", {}).get("hf_model_name")
    if args.lock_text and not args.lock_text_freeze_layer_norm and not from_hub:
        raise UserError("--lock-text: OpenCLIP freezes layer norms with the rest; add --lock-text-freeze-layer-norm")
    if args.opt.lower() != "adamw" and (args.beta1 is None) != (args.beta2 is None):
        raise UserError(f"--opt {args.opt}: timm takes --beta1 and --beta2, or neither")
    if args.lr_scheduler == COOLDOWN and args.epochs_cooldown is None:
        raise UserError(f"--lr-scheduler {COOLDOWN} needs --epochs-cooldown N")
    if args.distill_model is not None:
        _check_distillation(args)


def _check_distillation(args: argparse.Namespace) -> None:
    check_model_name("--distill-model", args.distill_model)
    flag = f"--distill-model {args.distill_model}"
    if args.accum_freq > 1:
        raise UserError(f"{flag}: OpenCLIP does not accumulate gradients with it (--accum-freq {args.accum_freq})")
    if args.siglip or is_coca(args):
        raise UserError(f"{flag}: OpenCLIP distills CLIP alone, by CLIP's loss; leave out --siglip and CoCa")
    if is_ov2_model(args.distill_model) or "coca" in args.distill_model.lower():
        raise UserError(f"{flag}: a teacher has features of images and texts; name a CLIP model")
    if ":" in args.distill_model and not brings_weights(args.distill_model):
        raise UserError(f"{flag}: it has no weights; name an architecture, and its weights by --distill-pretrained")


def check_fsdp(run: RunOptions, stages: Sequence[StagePlan], world_size: int) -> None:
    """Raises UserError for numbers and kinds that do not go with --fsdp."""
    if run.fsdp_hybrid and world_size % run.fsdp_hybrid:
        raise UserError(f"--fsdp-hybrid {run.fsdp_hybrid}: does not divide the {world_size} processes of the run")
    for args in (stage.args for stage in stages if run.fsdp):
        for name, value, known in (("precision", args.precision, _PRECISIONS), ("opt", args.opt.lower(), _OPTIMIZERS)):
            if value not in known:
                raise UserError(f"--fsdp --{name} {value}: expected one of {', '.join(known)}")
