"""Flags that do not fit together, or do not fit the model: one-line errors before anything is created."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import is_given
from open_clip_ov2.data import storage
from open_clip_ov2.errors import UserError, naming
from open_clip_ov2.evaluate.options import check_files, options_of
from open_clip_ov2.evaluate.tasks import check_tasks
from open_clip_ov2.openclip.command.data_flags import check_aspect, check_data, data_kind
from open_clip_ov2.openclip.command.flags import FAMILY, TrainOptions
from open_clip_ov2.openclip.command.stock_flags import check_stock
from open_clip_ov2.openclip.models import factory
from open_clip_ov2.openclip.models.eval_models import abilities_of
from open_clip_ov2.openclip.models.named_model import STATED, unstated
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
ALWAYS_BOTH = ("local_loss", "gather_with_grad")
# Refused with the reason, with every model and with ov2 models; docs/train_flags.md shows both.
REFUSED = {
    "trace": "a traced model cannot be trained",
    "use_bnb_linear": "bitsandbytes no longer has the layers that OpenCLIP 3.3 takes from it",
    "horovod": "use torchrun",
}
REFUSED_OV2 = {
    **dict.fromkeys(
        ("lock_text", "lock_text_unlocked_layers", "lock_text_freeze_layer_norm"),
        "it is for CLIP and CoCa (--lock-image freezes the vision encoder)",
    ),
    **dict.fromkeys(("siglip", "loss_dist_impl"), "it is for CLIP, such as clip-of-ov2-vit-b-16"),
    **dict.fromkeys(ALWAYS_BOTH, "it is for CLIP and CoCa (ov1-of-NAME always does both)"),
    **dict.fromkeys(("distill_model", "distill_pretrained"), "distillation is for contrastive models"),
    "torchscript": "use --torchcompile",
    "force_quick_gelu": "its blocks have GELU, as the published models",
    "pretrained_image": "OpenCLIP has weights for image towers of timm alone; use --pretrained",
}
_OF_OV2 = dict.fromkeys(
    (
        "keep_ratio", "eval_keep_ratio", "fusion", "label_smoothing", "z_loss", "decode", "activation_memory_budget",
        "prompt_keys", "tokens_per_step", "recompute_elementwise", "compile_encoder", "attention_kernel", "fp8",
        "aspect", "max_tokens",
    ),
    "leave it out",
)  # fmt: skip


PIXELS = ("--image-mean", "--image-std", "--image-interpolation")  # of ov2 models with --augmentation family


def check_stage(
    argv: Sequence[str], options: TrainOptions, theirs: argparse.Namespace, gpu: bool, needs_data: bool = True
) -> None:
    """Check the flags of one stage: `argv`, and what the two parsers made of it. `gpu`: whether the machine that will
    run it has one. Raises UserError."""
    _check_compute(options, theirs, gpu)
    _check_values(theirs, options)
    _refuse(argv, REFUSED)
    if needs_data:
        check_data(argv, theirs)
    if theirs.pretrained and ":" in theirs.model:
        raise UserError(
            f"--pretrained: OpenCLIP ignores it beside --model {theirs.model}, which brings weights of its own; leave "
            "it out, or give --model the name of an architecture"
        )
    if theirs.opt.lower() != "adamw" and not theirs.opt.lower().startswith("timm/"):
        raise UserError(f"--opt {theirs.opt}: expected adamw or timm/NAME")
    tracker_names(theirs.report_to)
    if theirs.ddp_static_graph and theirs.accum_freq > 1:
        raise UserError(
            f"--ddp-static-graph: torch's DDP cannot accumulate gradients with it (--accum-freq {theirs.accum_freq}); "
            "leave it out, or let a step have one batch"
        )
    _check_training(argv, options, theirs)
    is_ov2, their_pixels = factory.is_ov2_model(theirs.model), options.augmentation != FAMILY
    if is_ov2:
        both = theirs.local_loss and theirs.gather_with_grad and factory.is_contrastive(theirs.model)
        refused = {name: why for name, why in REFUSED_OV2.items() if not (both and name in ALWAYS_BOTH)}
        _refuse(argv, refused, f" with --model {theirs.model}")
    else:
        jitter = {"color_jitter": f"--augmentation {FAMILY} gives it their transform"} if their_pixels else {}
        _refuse(argv, _OF_OV2 | jitter, f" is for ov2 models, and --model is {theirs.model}")
    check_aspect(argv, options, theirs)
    check_stock(theirs)
    _check_transform(options, theirs, "OpenCLIP" if their_pixels and not is_ov2 else "ov2")
    try:
        factory.check_named_size(theirs.model, theirs.force_image_size)
    except ValueError as error:
        raise UserError(f"--force-image-size: {error}") from None


def _check_training(argv: Sequence[str], options: TrainOptions, theirs: argparse.Namespace) -> None:
    _check_remote(argv, theirs)
    if theirs.resume not in (None, "latest") and data_kind(theirs, train=True) is None:
        raise UserError("--resume: a run without --train-data has nothing to resume; give its weights by --pretrained")
    if theirs.delete_previous_checkpoint and is_given(argv, "--keep-checkpoints"):
        raise UserError("--delete-previous-checkpoint and --keep-checkpoints: give one or the other")
    if options.lora_rank and theirs.lock_image:
        raise UserError("--lock-image: --lora-rank freezes the vision tower already, and trains its adapters")
    if options.elastic and theirs.force_patch_dropout:
        raise UserError(
            "--force-patch-dropout: the patches that it drops do not follow the samples, as --elastic wants it"
        )
    if options.lora_alpha and not options.lora_rank:
        raise UserError("--lora-alpha is for adapters; add --lora-rank R")
    if options.tokens_per_step is not None:
        why = "with --tokens-per-step the number of images in a step is not fixed"
        _refuse(argv, {"accum_freq": why, "global_batch": why, "base_lr": f"{why}; give --lr"})


def _check_remote(argv: Sequence[str], theirs: argparse.Namespace) -> None:
    address, protocol = theirs.remote_sync, "--remote-sync-protocol"
    if address is None:
        _refuse(argv, dict.fromkeys(("remote_sync_frequency", "remote_sync_protocol"), "there is no --remote-sync URL"))
        return
    with naming("--remote-sync"):
        storage.check_writable(address)
        storage.check_apart(address, Path(theirs.logs), theirs.name)
    if theirs.remote_sync_protocol == "s3" and is_given(argv, protocol) and not address.startswith("s3"):
        raise UserError(f"{protocol} s3: --remote-sync {address} is not s3://; give fsspec, or leave the flag out")


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


def _refuse(argv: Sequence[str], refused: Mapping[str, str], where: str = "") -> None:
    for name, why in refused.items():
        if is_given(argv, _flag(name)):
            raise UserError(f"{_flag(name)}{where}: {why}")


def _check_compute(options: TrainOptions, theirs: argparse.Namespace, gpu: bool) -> None:
    """Flags of the device, of kernels, and of what is kept for the backward pass. `gpu`: whether there is one."""
    if theirs.device.startswith("cuda") and not gpu:
        raise UserError(f"--device {theirs.device}: no CUDA device here; leave the flag out to run on the CPU")
    gpu = gpu and theirs.device != "cpu"
    if not gpu and theirs.precision in ("amp", "fp16", "pure_fp16"):
        raise UserError(f"--precision {theirs.precision} needs a GPU; on a CPU use amp_bf16 or fp32")
    model, whole = factory.config_named(theirs.model), options.compile_encoder != "blocks"
    encoder = f"--compile-encoder {options.compile_encoder}"
    if not theirs.torchcompile and (whole or options.activation_memory_budget is not None):
        name = encoder if whole else "--activation-memory-budget"
        raise UserError(f"{name} is for torch.compile; add --torchcompile")
    if whole and (model.get(factory.CONTRASTIVE_KEY) or model.get(factory.ONE_TRANSFORMER_KEY)):
        raise UserError(f"{encoder}: only for models that train by the caption loss alone; leave it out")
    if options.recompute_elementwise and theirs.grad_checkpointing:
        raise UserError("--recompute-elementwise: --grad-checkpointing recomputes whole blocks; give one of the two")
    if options.fp8 and options.lora_rank:
        raise UserError("--fp8: adapters (--lora-rank) do not multiply in float8; give one of the two")
    for name, used in (
        (encoder, options.compile_encoder == "cuda-graphs"),
        (f"--attention-kernel {options.attention_kernel}", options.attention_kernel),
        ("--fp8 on", options.fp8 == "on"),
    ):
        if used and not gpu:
            raise UserError(f"{name}: needs a GPU")


def _check_transform(options: TrainOptions, theirs: argparse.Namespace, transform: str) -> None:
    """Flags that this transform of training images, of `ov2` models or `OpenCLIP`'s, ignores."""
    timm, interpolation = theirs.aug_cfg.get("use_timm"), theirs.image_interpolation
    if timm and options.color_jitter:
        raise UserError(
            "--color-jitter is not for --aug-cfg use_timm=True; give timm's with --aug-cfg color_jitter=0.4"
        )
    if timm and options.decode == "fast":
        raise UserError("--decode fast: --aug-cfg use_timm=True needs whole images; leave --decode out")
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
