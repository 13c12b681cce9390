"""Flags of OpenCLIP that it passes over, or fails with, unless others go with them: one-line errors instead."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from open_clip.factory import get_model_config

from open_clip_ov2.argv import is_given
from open_clip_ov2.errors import UserError, first_line, nearest
from open_clip_ov2.openclip.command.run_plan import StagePlan
from open_clip_ov2.openclip.models import factory
from open_clip_ov2.openclip.models.own_config import brings_weights

COOLDOWN = "const-cooldown"


def _is_coca(args: argparse.Namespace) -> bool:
    return "coca" in args.model.lower()  # what OpenCLIP's create_loss goes by


def _has_contrast(args: argparse.Namespace) -> bool:
    return bool((get_model_config(args.model) or {}).get(factory.CONTRASTIVE_KEY))


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
    ("--coca-caption-loss-weight", "a model with captions", lambda a: _is_coca(a) or factory.is_ov2_model(a.model)),
    ("--coca-contrastive-loss-weight", "CoCa or ov1-of-NAME", lambda args: _is_coca(args) or _has_contrast(args)),
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
            factory.is_ov2_model(name)
        except Exception as error:  # whatever upstream raises for a missing folder or a hub that cannot be reached
            raise UserError(f"{flag} {name}: its config cannot be read ({first_line(error)})") from error
    elif name not in factory.known_models():
        if Path(name).is_dir():
            raise UserError(
                f"{flag} {name}: a folder; {flag} local-dir:{name} takes its model and weights, of a run the newest"
            )
        hint = nearest(name, factory.known_models(), count=3)
        raise UserError(f"{flag} {name}: no such model{hint} (open_clip.list_models() lists them)")


def check_stock(args: argparse.Namespace) -> None:
    """Raises UserError for what ends in an assertion or an empty hand in OpenCLIP's `main`."""
    if args.logs.lower() == "none":
        raise UserError(f"--logs {args.logs}: a run is resumed from its folder, so it needs one; name a folder")
    theirs = (get_model_config(args.model) or {}).get("text_cfg", {}).get("hf_model_name")  # frees its layer norms
    if args.lock_text and not args.lock_text_freeze_layer_norm and not theirs:
        raise UserError("--lock-text: OpenCLIP freezes layer norms with the rest; add --lock-text-freeze-layer-norm")
    if args.opt.lower() != "adamw" and (args.beta1 is None) != (args.beta2 is None):
        raise UserError(f"--opt {args.opt}: timm takes --beta1 and --beta2, or neither")
    if args.lr_scheduler == COOLDOWN and args.epochs_cooldown is None:
        raise UserError(f"--lr-scheduler {COOLDOWN} needs --epochs-cooldown N")
    vision = (get_model_config(args.model) or {}).get("vision_cfg", {})
    if args.pretrained_image and not vision.get("timm_model_name"):
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
    if factory.is_ov2_model(args.distill_model) or "coca" in args.distill_model.lower():
        raise UserError(f"{flag}: a teacher has features of images and texts; name a CLIP model")
    if ":" in args.distill_model and not brings_weights(args.distill_model):
        raise UserError(f"{flag}: it has no weights; name an architecture, and its weights by --distill-pretrained")
