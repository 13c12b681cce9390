"""Flags that do not fit together, or do not fit the model: one-line errors before anything is created."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_clip import list_models

from open_clip_ov2.argv import is_given
from open_clip_ov2.data import storage
from open_clip_ov2.errors import UserError, first_line, naming, nearest
from open_clip_ov2.evaluate.options import check_files, options_of
from open_clip_ov2.evaluate.tasks import check_tasks
from open_clip_ov2.openclip.command.data_flags import check_data, data_kind
from open_clip_ov2.openclip.command.flags import FAMILY, RunOptions, TrainOptions
from open_clip_ov2.openclip.command.refusals import (
    ALWAYS,
    COOLDOWN,
    OF_DATA,
    OTHERS,
    WITH_OV2,
    StageFlags,
    is_coca,
    refuse,
)
from open_clip_ov2.openclip.command.run_plan import StagePlan
from open_clip_ov2.openclip.models import factory
from open_clip_ov2.openclip.models.eval_models import abilities_of
from open_clip_ov2.openclip.models.named_model import STATED, unstated
from open_clip_ov2.openclip.models.own_config import brings_weights
from open_clip_ov2.openclip.models.preprocess import check_aug_cfg
from open_clip_ov2.recipe.stage import SCHEDULES
from open_clip_ov2.tables import Reader, one_of, real, text, whole
from open_clip_ov2.tracking.sinks import tracker_names


def _numbers(read: Reader, *counts: int) -> Reader:
    def read_all(value: Any) -> tuple[Any, ...]:
        if len(value) not in counts:
            raise UserError(f"{len(value)} numbers; expected {' or '.join(map(str, counts))}")
        return tuple(map(read, value))

    return read_all


# What OpenCLIP's parser leaves unchecked.
_READERS = {
    **dict.fromkeys(("batch_size", "accum_freq", "epochs", "log_every_n_steps", "force_context_length"), whole(1)),
    **dict.fromkeys(("train_num_samples", "val_num_samples", "remote_sync_frequency"), whole(1)),
    "force_image_size": _numbers(whole(1), 1, 2),  # a square, or height and width
    "image_mean": _numbers(real(0, 1), 3),  # one for each channel
    "image_std": _numbers(real(0, above=True), 3),
    "name": text,
    **dict.fromkeys(("workers", "warmup"), whole(0)),
    **dict.fromkeys(("lr", "wd", "grad_clip_norm"), real(0)),
    **dict.fromkeys(("beta1", "beta2", "force_patch_dropout"), real(0, 1)),
    "seed": real(0, 2**32 - 1),
    "lr_scheduler": one_of(*SCHEDULES),
}
# Sharded by FSDP2: what has been tried, and is equal to DDP (tests/openclip/test_fsdp.py).
_OPTIMIZERS = ("adamw", "timm/adamw", "timm/muon")
_PRECISIONS = ("fp32", "amp_bf16", "amp_bfloat16", "pure_bf16")
PIXELS = ("--image-mean", "--image-std", "--image-interpolation")  # of ov2 models with --augmentation family


def check_model_name(flag: str, name: str) -> None:
    """Raises UserError for a model that there is not, or whose config cannot be read."""
    if ":" in name:
        try:
            factory.config_named(name)
        except Exception as error:  # whatever upstream raises for a missing folder or a hub that cannot be reached
            raise UserError(f"{flag} {name}: its config cannot be read ({first_line(error)})") from error
    elif name not in list_models():
        if Path(name).is_dir():
            raise UserError(
                f"{flag} {name}: a folder; {flag} local-dir:{name} takes its model and weights, of a run the newest"
            )
        hint = nearest(name, list_models(), count=3)
        raise UserError(f"{flag} {name}: no such model{hint} (open_clip.list_models() lists them)")


def check_stage(stage: StageFlags, needs_data: bool = True) -> None:
    """Check the flags of one stage. Raises UserError."""
    options, theirs = stage.options, stage.args
    if theirs.device.startswith("cuda") and not stage.gpu:
        raise UserError(f"--device {theirs.device}: no CUDA device here; leave the flag out to run on the CPU")
    if not stage.on_gpu and theirs.precision in ("amp", "fp16", "pure_fp16"):
        raise UserError(f"--precision {theirs.precision} needs a GPU; on a CPU use amp_bf16 or fp32")
    _check_values(theirs, options)
    refuse((*ALWAYS, *WITH_OV2, *OTHERS), [stage])
    if needs_data:
        check_data(theirs)
        refuse(OF_DATA, [stage])
    if theirs.opt.lower() != "adamw" and not theirs.opt.lower().startswith("timm/"):
        raise UserError(f"--opt {theirs.opt}: expected adamw or timm/NAME")
    tracker_names(theirs.report_to)
    if theirs.remote_sync is not None:
        _check_remote(stage)
    if theirs.resume not in (None, "latest") and data_kind(theirs, train=True) is None:
        raise UserError("--resume: a run without --train-data has nothing to resume; give its weights by --pretrained")
    check_stock(theirs)
    is_stock = options.augmentation != FAMILY and not factory.is_ov2_model(theirs.model)
    _check_transform(options, theirs, "OpenCLIP" if is_stock else "ov2")
    try:
        factory.check_named_size(theirs.model, theirs.force_image_size)
    except ValueError as error:
        raise UserError(f"--force-image-size: {error}") from None


def _check_remote(stage: StageFlags) -> None:
    address, theirs = stage.args.remote_sync, stage.args
    with naming("--remote-sync"):
        storage.check_writable(address)
        storage.check_apart(address, Path(theirs.logs), theirs.name)
    if stage.has("--remote-sync-protocol s3") and not address.startswith("s3"):
        raise UserError(
            f"--remote-sync-protocol s3: --remote-sync {address} is not s3://; give fsspec, or leave the flag out"
        )


def check_stages(stages: Sequence[TrainOptions], carry_optimizer: bool) -> None:
    """Raises UserError if stages differ in what one of them hands on to the next."""
    same = {"lora_rank": "the next stage continues the adapters of the one before"}
    if carry_optimizer:
        same |= dict.fromkeys(("lr_layer_decay", "wd_exclude", "freeze"), "--carry-optimizer needs the same groups")
    for name, why in same.items():
        if any(getattr(options, name) != getattr(stages[0], name) for options in stages):
            raise UserError(f"{_flag(name)}: must be the same in all stages, since {why}")


def _check_values(theirs: argparse.Namespace, options: TrainOptions) -> None:
    entries = {key.entry for key in (*options.caption_keys, *(options.prompt_keys or ()))}
    for one in options.captions:
        if one.name not in entries:
            raise UserError(
                f"--captions {one}: no caption is read from it; add it to --caption-keys, for example "
                f"--caption-keys '{one.name}:caption=0.8,txt=0.2'"
            )
    for name, read in _READERS.items():
        if (value := getattr(theirs, name)) is not None:
            with naming(_flag(name)):
                read(value)
    if theirs.lr is None:
        raise UserError(f"--opt {theirs.opt}: OpenCLIP has a default learning rate for AdamW alone; give --lr")
    tokens = options.tokens_per_step is not None
    if (tokens or theirs.accum_freq > 1) and factory.is_contrastive(theirs.model):
        raise UserError(
            f"{'--tokens-per-step' if tokens else f'--accum-freq {theirs.accum_freq}'}: a contrastive loss compares "
            f"all pairs of a batch, and --model {theirs.model} has them in one pass; give a larger --batch-size, or "
            "leave the flag out"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_transform(options: TrainOptions, theirs: argparse.Namespace, transform: str) -> None:
    """Flags that this transform of training images, of `ov2` models or `OpenCLIP`'s, ignores."""
    timm, interpolation = theirs.aug_cfg.get("use_timm"), theirs.image_interpolation
    validates = interpolation == "bilinear" and theirs.val_data and not data_kind(theirs, train=True)
    if transform == "OpenCLIP" and not timm and interpolation not in (None, "bicubic") and not validates:
        raise UserError(
            f"--image-interpolation {interpolation}: OpenCLIP's training crop of {theirs.model} is bicubic whatever is "
            f"asked for; add --aug-cfg use_timm=True, or --augmentation {FAMILY} for the crop of ov2 models"
        )
    try:
        check_aug_cfg(options.aug_cfg(theirs.aug_cfg), transform)
    except ValueError as error:
        raise UserError(f"--aug-cfg: {error}") from None


def check_stock(args: argparse.Namespace) -> None:
    """Raises UserError for what ends in an assertion or an empty hand in OpenCLIP's `main`."""
    if args.logs.lower() == "none":
        raise UserError(f"--logs {args.logs}: a run is resumed from its folder, so it needs one; name a folder")
    # OpenCLIP frees the layer norms of a text tower from the hub.
    from_hub = factory.config_named(args.model).get("text_cfg", {}).get("hf_model_name")
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
    if factory.is_ov2_model(args.distill_model) or "coca" in args.distill_model.lower():
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


def check_eval(flags: str, theirs: argparse.Namespace) -> None:
    """Check `--eval` before the first step rather than at the first validation. Raises UserError."""
    if not theirs.val_data:
        raise UserError("--eval: its tasks run at each validation, and there is no --val-data")
    options = options_of(flags, "--eval")
    with naming("--eval"):
        check_tasks(options, theirs.model, abilities_of(factory.config_named(theirs.model)))
        check_files(options)
        if options.aspect or options.max_tokens:
            raise UserError("--aspect, --max-tokens: images are those of the run; leave the flags out")
        if options.cache:
            raise UserError("--cache: features of a model in training cannot be cached; leave the flag out")


def check_pretrained(argv: Sequence[str], tokenizer: str | None, theirs: argparse.Namespace) -> None:
    """Check that the flags say what --pretrained was trained with, as far as its weights' shapes do not, and that a
    run's folder has weights; that the file of --resume exists. Raises UserError."""
    resumed = theirs.resume
    if resumed not in (None, "latest") and not storage.is_store(resumed) and not Path(resumed).is_file():
        folder = f"a folder; if it is a sharded checkpoint, make a file of it: ov2 convert {resumed} --to FILE.pt"
        why = folder if Path(resumed).is_dir() else "no such file; expected one such as RUN/checkpoints/stage_1.pt"
        raise UserError(f"--resume {resumed}: {why}")
    family = PIXELS if is_given(argv, "--augmentation") else ()  # it states those of ov2 models
    stated = [flag for flag in STATED if is_given(argv, flag) or flag in family]
    if missing := unstated(theirs.model, theirs.pretrained, stated, tokenizer, theirs.cache_dir):
        raise UserError(
            f"--pretrained {theirs.pretrained}: was trained with {' '.join(missing)}, which differs from --model "
            f"{theirs.model}; add these flags, or give the values that you want (--model local-dir:FOLDER or NAME:TAG "
            "takes all from the checkpoint's own folder)"
        )
