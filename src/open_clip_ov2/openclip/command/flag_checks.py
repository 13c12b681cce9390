"""Flags that do not fit together, or do not fit the model: one-line errors before anything is made."""

from __future__ import annotations

import argparse
from pathlib import Path

from open_clip.factory import get_model_config

from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.eval_model import Ability
from open_clip_ov2.evaluate.options import options_of, source_of
from open_clip_ov2.evaluate.tasks import TASKS, check_tasks
from open_clip_ov2.openclip.command.flags import FAMILY, TrainOptions
from open_clip_ov2.openclip.models import factory
from open_clip_ov2.tracking.sinks import tracker_names

_RANGES = {
    "lr": (0, float("inf")), "wd": (0, float("inf")), "warmup": (0, float("inf")), "seed": (0, 2**32 - 1),
    "beta1": (0, 1), "beta2": (0, 1), "grad_clip_norm": (0, float("inf")), "force_patch_dropout": (0, 1),
    "force_context_length": (1, float("inf")),
}  # fmt: skip
_REFUSED = {
    "copy_codebase": "`ov2 submit` takes a snapshot of the code; otherwise keep the commit",
    "save_most_recent": "the last --keep-checkpoints are kept, and a run goes on from the newest",
    "delete_previous_checkpoint": "--keep-checkpoints 1 keeps the last alone",
    "remote_sync": "copy the run's folder with a tool of your own; every file in checkpoints/ is whole",
}


def check_stage(options: TrainOptions, theirs: argparse.Namespace, gpu: bool) -> None:
    """`gpu`: whether the machine that will run it has one. Raises UserError."""
    family = factory.is_ov2_model(theirs.model)
    on_cpu = theirs.device == "cpu" or not gpu
    if theirs.device.startswith("cuda") and not gpu:
        raise UserError(f"--device {theirs.device}: no CUDA device here; leave the flag out to run on the CPU")
    if on_cpu and theirs.precision in ("amp", "fp16", "pure_fp16"):
        raise UserError(f"--precision {theirs.precision} needs a GPU; on a CPU use amp_bf16 or fp32")
    for flag, folder in (("--imagenet-val", theirs.imagenet_val), ("--imagenet-v2", theirs.imagenet_v2)):
        if folder and not Path(folder).is_dir():
            raise UserError(f"{flag} {folder}: no such folder")
    validates = theirs.val_data or theirs.imagenet_val or theirs.imagenet_v2
    if not theirs.train_data and not validates and theirs.dataset_type != "synthetic":
        raise UserError("ov2 train: --train-data is missing, for example --train-data 'shards/{00000..00999}.tar'")
    for flag in ("batch_size", "accum_freq", "epochs", "log_every_n_steps"):
        if getattr(theirs, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(theirs, flag)}")
    for name, why in _REFUSED.items():
        if getattr(theirs, name):
            raise UserError(f"--{name.replace('_', '-')}: {why}")
    if theirs.resume not in (None, "latest"):
        raise UserError("--resume: the same command again goes on by itself; for weights alone use --pretrained FILE")
    for name, (low, high) in _RANGES.items():
        value = getattr(theirs, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value:g} lies outside {low:g} to {high:g}")
    if theirs.opt.lower() != "adamw" and not theirs.opt.lower().startswith("timm/"):
        raise UserError(f"--opt {theirs.opt}: adamw, or timm/NAME")
    if theirs.lr_scheduler not in ("cosine", "const", "const-cooldown"):
        raise UserError(f"--lr-scheduler {theirs.lr_scheduler}: one of cosine, const, const-cooldown")
    if theirs.lr_scheduler == "const-cooldown" and theirs.epochs_cooldown is None:
        raise UserError("--lr-scheduler const-cooldown needs --epochs-cooldown N")
    if theirs.workers < 0:
        raise UserError(f"--workers must be at least 0, got {theirs.workers}")
    tracker_names(theirs.report_to)
    if options.activation_memory_budget is not None and not theirs.torchcompile:
        raise UserError("--activation-memory-budget: torch.compile keeps to it; add --torchcompile")
    if family:
        _check_family(theirs)
    else:
        _check_baseline(options, theirs)


def _check_family(theirs: argparse.Namespace) -> None:
    refused = {
        "lock_text": "an ov2 model has no text tower (--lock-image locks its encoder)",
        "siglip": "an ov2 model has no contrastive loss",
        "distill_model": "distillation is for contrastive models",
        "torchscript": "use --torchcompile",
        "trace": "a traced model cannot be trained",
        "horovod": "use torchrun",
        "use_bnb_linear": "not for caption models",
        "imagenet_val": "zero-shot classification needs a text encoder",
        "imagenet_v2": "zero-shot classification needs a text encoder",
    }
    for name, why in refused.items():
        if getattr(theirs, name):
            raise UserError(f"--{name.replace('_', '-')} with --model {theirs.model}: {why}")


def _abilities(model: str) -> frozenset[Ability]:
    """What a model with such a config can be asked for."""
    config = get_model_config(model) or {}
    if factory.is_ov2_config(config):
        return frozenset(("features", "caption"))
    contrastive: tuple[Ability, ...] = ("features", "contrast")
    return frozenset((*contrastive, "caption") if "multimodal_cfg" in config else contrastive)


def check_eval(flags: str, theirs: argparse.Namespace) -> None:
    """`--eval`, before the first step rather than at the first validation. Raises UserError."""
    if not theirs.val_data:
        raise UserError("--eval: its tasks run with each validation, and there is no --val-data")
    options = options_of(flags, "--eval")
    able = _abilities(theirs.model)
    for name in check_tasks(options.tasks):
        reason = TASKS[name].lacks_flags(options)
        if TASKS[name].ability not in able:
            reason = f"{theirs.model} has no {TASKS[name].ability} (it has: {', '.join(sorted(able))})"
        if reason or name == "image-sizes":
            raise UserError(f"--eval: {name}: {reason or 'a model in training keeps its resolution'}")
    if options.cache or (options.questions and not options.questions.is_file()):
        cause = (
            "features of a model in training are not kept" if options.cache else f"{options.questions}: no such file"
        )
        raise UserError(f"--eval: {cause}")
    for data in (options.data, options.train_data):
        if data:
            source_of(data)


def _check_baseline(options: TrainOptions, theirs: argparse.Namespace) -> None:
    given = {
        "--keep-ratio": options.keep_ratio,
        "--eval-keep-ratio": options.eval_keep_ratio,
        "--fusion": options.fusion,
        "--label-smoothing": options.label_smoothing,
        "--z-loss": options.z_loss,
        "--activation-memory-budget": options.activation_memory_budget is not None,
        "--color-jitter": options.color_jitter and options.augmentation != FAMILY,
        "--decode": options.decode,
    }
    for flag, value in given.items():
        if value:
            hint = f" (--augmentation {FAMILY} gives it their transform)" if flag == "--color-jitter" else ""
            raise UserError(f"{flag} is for ov2 models, and --model is {theirs.model}{hint}")
    if options.augmentation == FAMILY:
        uses_timm = theirs.aug_cfg.get("use_timm")
        for flag, value in (("image-interpolation", theirs.image_interpolation), ("aug-cfg use_timm", uses_timm)):
            if value:
                raise UserError(f"--{flag}: --augmentation {FAMILY} says it already; leave one of the two out")
