"""Flags of `ov2 train` that are refused beside others or without them, or with some models: one list of rules, which
docs/train_flags.md shows too."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from open_clip_ov2.argv import is_given, value_of
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.command.data_flags import data_kind
from open_clip_ov2.openclip.command.flags import FAMILY, NATIVE, TrainOptions
from open_clip_ov2.openclip.models.factory import (
    CONTRASTIVE_KEY,
    ONE_TRANSFORMER_KEY,
    config_named,
    is_contrastive,
    is_ov2_model,
)

COOLDOWN = "const-cooldown"


class StageFlags(NamedTuple):
    """All flags of a stage, what the two parsers made of them, and whether the machine that will run it has a GPU."""

    argv: Sequence[str]
    options: TrainOptions
    args: argparse.Namespace
    gpu: bool

    def has(self, wanted: str) -> bool:
        """Whether `--flag` is given; of `--flag value`, whether it has this value."""
        flag, _, value = wanted.partition(" ")
        return is_given(self.argv, flag) and value in ("", value_of(self.argv, flag))

    @property
    def on_gpu(self) -> bool:
        return self.gpu and self.args.device != "cpu"


class Rule(NamedTuple):
    """Why flags (`--flag, --flag value, ...`) are refused `where` it `applies` to a stage. {model} in `where` is the
    stage's --model, or a kind of model."""

    flags: str
    where: str
    why: str
    applies: Callable[[StageFlags], object] = lambda stage: True


def refuse(rules: Iterable[Rule], stages: Sequence[StageFlags]) -> None:
    """Raises UserError for a flag of one of the stages whose rule applies to all of them."""
    for rule in rules:
        for flag in rule.flags.split(", "):
            if any(stage.has(flag) for stage in stages) and all(rule.applies(stage) for stage in stages):
                where = rule.where.format(model=f"--model {stages[0].args.model}")
                raise UserError(f"{flag}{where}: {rule.why}")


def _with(other: str, flags: str, why: str) -> Rule:
    return Rule(flags, f" with {other}", why, lambda stage: stage.has(other))


def _without(needed: str, flags: str, has: Callable[[StageFlags], object] | None = None) -> Rule:
    found = has or (lambda stage: stage.has(needed))
    why = "it has no effect; add that, or leave the flag out"
    return Rule(flags, f" without {needed}", why, lambda stage: not found(stage))


def is_coca(args: argparse.Namespace) -> bool:
    return "coca" in args.model.lower()  # what OpenCLIP's create_loss goes by


def _is_ov2(stage: StageFlags) -> bool:
    return is_ov2_model(stage.args.model)


def _asks_for_one_loss(stage: StageFlags) -> bool:
    """Whether an ov2 model is asked for less or more than what it does with two losses."""
    args = stage.args
    return _is_ov2(stage) and not (args.local_loss and args.gather_with_grad and is_contrastive(args.model))


def _has_other_losses(stage: StageFlags) -> bool:
    config = config_named(stage.args.model)
    return bool(config.get(CONTRASTIVE_KEY) or config.get(ONE_TRANSFORMER_KEY))


def _uses_timm(stage: StageFlags) -> bool:
    return bool(stage.args.aug_cfg.get("use_timm"))


def _kinds(stage: StageFlags) -> tuple[str | None, str | None]:
    return data_kind(stage.args, train=True), data_kind(stage.args, train=False)


ALWAYS = (
    Rule("--trace", "", "a traced model cannot be trained"),
    Rule("--use-bnb-linear", "", "bitsandbytes no longer has the layers that OpenCLIP 3.3 takes from it"),
    Rule("--horovod", "", "use torchrun"),
)
WITH_OV2 = (
    Rule("--lock-text, --lock-text-unlocked-layers, --lock-text-freeze-layer-norm", " with {model}",
         "it is for CLIP and CoCa (--lock-image freezes the vision encoder)", _is_ov2),
    Rule("--siglip, --loss-dist-impl", " with {model}", "it is for CLIP, such as clip-of-ov2-vit-b-16", _is_ov2),
    Rule("--distill-model, --distill-pretrained", " with {model}", "distillation is for contrastive models", _is_ov2),
    Rule("--torchscript", " with {model}", "use --torchcompile", _is_ov2),
    Rule("--force-quick-gelu", " with {model}", "its blocks have GELU, as the published models", _is_ov2),
    Rule("--local-loss, --gather-with-grad", " with {model}", "it is for CLIP and CoCa (ov1-of-NAME always does both)",
         _asks_for_one_loss),
)  # fmt: skip
OTHERS = (
    Rule("--keep-ratio, --eval-keep-ratio, --fusion, --label-smoothing, --z-loss, --decode, --prompt-keys, --fp8, "
         "--activation-memory-budget, --tokens-per-step, --recompute-elementwise, --compile-encoder, --max-tokens, "
         "--attention-kernel, --aspect", " with {model}", "it is for ov2 models; leave it out",
         lambda stage: not _is_ov2(stage)),
    Rule("--color-jitter", " with {model}", f"it is for ov2 models; --augmentation {FAMILY} gives it their transform",
         lambda stage: not _is_ov2(stage) and stage.options.augmentation != FAMILY),
    Rule("--compile-encoder whole, --compile-encoder cuda-graphs", " with {model}",
         "only for models that train by the caption loss alone; leave it out", _has_other_losses),
    Rule("--compile-encoder cuda-graphs, --attention-kernel, --fp8 on", " without a GPU", "it needs one",
         lambda stage: not stage.on_gpu),
    _with(f"--aspect {NATIVE}", "--force-patch-dropout",
          "it drops equally many patches of each image; --keep-ratio drops after the encoder"),
    _with(f"--aspect {NATIVE}", "--lora-rank", "the adapters are for the encoder's attention over images of one shape"),
    _with(f"--aspect {NATIVE}", "--compile-encoder", "the blocks are compiled for any number of tokens; leave it out"),
    _with(f"--aspect {NATIVE}", "--fsdp", "images of any shape go through parts of a block"),
    _without(f"--aspect {NATIVE}", "--max-tokens"),
    Rule(f"--aspect {NATIVE}", " with {model}", "its contrastive loss takes images of one shape",
         lambda stage: is_contrastive(stage.args.model)),
    Rule(f"--aspect {NATIVE}", " with --aug-cfg use_timm=True", "timm's crop gives squares; leave it out", _uses_timm),
    _with("--tokens-per-step", "--accum-freq, --global-batch", "the number of images in a step is not fixed"),
    _with("--tokens-per-step", "--base-lr", "the number of images in a step is not fixed; give --lr"),
    _with("--lora-rank", "--lock-image", "--lora-rank freezes the vision tower already, and trains its adapters"),
    _with("--lora-rank", "--fp8", "adapters do not multiply in float8; give one of the two"),
    _with("--grad-checkpointing", "--recompute-elementwise", "that recomputes whole blocks; give one of the two"),
    _with("--delete-previous-checkpoint", "--keep-checkpoints", "give one or the other"),
    _with("--fsdp", "--ddp-static-graph", "it is DDP's"),
    _with("--fsdp", "--distill-model", "the teacher would be sharded too"),
    _with("--fsdp", "--fp8, --compile-encoder whole, --compile-encoder cuda-graphs", "blocks are gathered one by one"),
    _with("--fsdp-checkpoint sharded", "--remote-sync", "it copies files; give one of the two"),
    _with("--fsdp-checkpoint sharded", "--save-most-recent", "it leads to a file; give one of the two"),
    _with("--fsdp-checkpoint sharded", "--lora-rank", "checkpoints have adapters merged; give one of the two"),
    Rule("--force-patch-dropout", " with --elastic", "the patches that it drops do not follow the samples",
         lambda stage: stage.options.elastic and stage.args.force_patch_dropout),
    Rule("--ddp-static-graph", " where a step has several batches",
         "torch's DDP cannot accumulate gradients with it; leave it out, or let a step have one batch",
         lambda stage: stage.args.accum_freq > 1),
    Rule("--color-jitter", " with --aug-cfg use_timm=True", "give timm's with --aug-cfg color_jitter=0.4", _uses_timm),
    Rule("--decode fast", " with --aug-cfg use_timm=True", "timm's transform takes whole images", _uses_timm),
    Rule("--siglip", " with CoCa", "its loss is another; leave the flag out", lambda stage: is_coca(stage.args)),
    Rule("--pretrained", " with {model}", "OpenCLIP ignores it beside --model NAME:TAG or SCHEMA:PLACE, which brings "
         "weights of its own; leave it out, or give --model the name of an architecture",
         lambda stage: stage.args.pretrained and ":" in stage.args.model),
    Rule("--pretrained-image", " without an image tower of timm",
         "OpenCLIP has weights for image towers of timm alone; use --pretrained",
         lambda stage: not config_named(stage.args.model).get("vision_cfg", {}).get("timm_model_name")),
    _without("--eval", "--eval-every-samples"),
)  # fmt: skip
# Of a run that has data.
OF_DATA = (
    _without("tars to train on", "--dataset-resampled, --train-data-upsampling-factors",
             lambda stage: data_kind(stage.args, train=True) in (None, "webdataset")),
    _without("--dataset-resampled", "--train-data-upsampling-factors"),
    _without("tars", "--captions, --val-captions", lambda stage: "webdataset" in _kinds(stage)),
    _without("a csv (--caption-keys says where tars have captions)",
             "--csv-separator, --csv-img-key, --csv-caption-key", lambda stage: "csv" in _kinds(stage)),
    _with("--caption-keys", "--csv-caption-key", "give one or the other; --caption-keys names columns too"),
)  # fmt: skip
# Refused if this is so in all stages of a run; those above, if it is so in one.
NEEDS = (
    _without("--lock-image", "--lock-image-unlocked-groups, --lock-image-freeze-bn-stats"),
    _without("--lock-text", "--lock-text-unlocked-layers, --lock-text-freeze-layer-norm"),
    _without("--distill-pretrained", "--distill-model"),
    _without("--distill-model", "--distill-pretrained"),
    _without("--siglip", "--loss-dist-impl"),
    _without("--lora-rank", "--lora-alpha"),
    _without("--torchcompile", "--activation-memory-budget, --compile-encoder whole, --compile-encoder cuda-graphs"),
    _without("--fsdp", "--fsdp-hybrid, --fsdp-checkpoint sharded"),
    _without("--remote-sync", "--remote-sync-frequency, --remote-sync-protocol"),
    _without(f"--lr-scheduler {COOLDOWN}", "--epochs-cooldown, --lr-cooldown-end, --lr-cooldown-power"),
    _without("--opt timm/NAME", "--momentum", lambda stage: stage.args.opt.lower() != "adamw"),
    _without("a model with captions", "--coca-caption-loss-weight",
             lambda stage: is_coca(stage.args) or _is_ov2(stage)),
    _without("CoCa or ov1-of-NAME", "--coca-contrastive-loss-weight",
             lambda stage: is_coca(stage.args) or is_contrastive(stage.args.model)),
)  # fmt: skip
