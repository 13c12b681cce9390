"""A recipe's stage as flags of OpenCLIP and ours, and the flags that follow from others."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence

from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.models import factory
from open_clip_ov2.recipe import Recipe, Stage


def last(words: Sequence[str], flag: str) -> int:
    """Where a flag stands last in argv; -1 if it does not. Of flags that say the same, the last one counts."""
    places = [index for index, word in enumerate(words) if word == flag or word.startswith(flag + "=")]
    return places[-1] if places else -1


def given(words: Sequence[str], flag: str) -> bool:
    return last(words, flag) >= 0


def without(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """argv without flags that take one value each."""
    out, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in flags:
            skip = True
        elif not any(word.startswith(f"{flag}=") for flag in flags):
            out.append(word)
    return out


def one_aug_cfg(words: Sequence[str]) -> list[str]:
    """argv with all its --aug-cfg in one: of OpenCLIP's flag the last would take the place of the others, and a
    recipe's crop scale is one of them. Of equal keys the last counts."""
    rest, found, inside = [], {}, False
    for word in words:
        if word.startswith("--"):
            inside = word.split("=")[0] == "--aug-cfg"
            word = word.partition("=")[2] if inside else word
        if not inside:
            rest.append(word)
        elif word:
            found[word.partition("=")[0]] = word
    return [*rest, "--aug-cfg", *found.values()] if found else rest


def recipe_words(recipe: Recipe) -> list[str]:
    """The model and the [train] table."""
    words = ["--model", recipe.model] if recipe.model else []
    for key, value in recipe.flags.items():
        words += _flag(key, value)
    return words


def _flag(key: str, value: object) -> list[str]:
    flag = f"--{key.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag] if value else []
    values = value if isinstance(value, (list, tuple)) else [value]
    return [flag, *(str(item) for item in values)]


def stage_words(stage: Stage) -> list[str]:
    """What a stage says, as flags."""
    values: Mapping[str, object] = {
        "force-image-size": stage.resolution,
        "train-num-samples": stage.samples,
        "epochs": 1,
        "global-batch": stage.global_batch,
        "batch-size": stage.batch_size,
        "lr": stage.lr,
        "base-lr": stage.base_lr,
        "warmup-samples": stage.warmup_samples,
        "lr-scheduler": stage.schedule,
        "keep-ratio": stage.keep_ratio,
        "eval-keep-ratio": stage.eval_keep_ratio,
        "wd": stage.weight_decay,
        "precision": stage.precision,
        "grad-checkpointing": stage.grad_checkpointing,
        "force-context-length": stage.context_length,
        "train-data": stage.train_data,
    }
    words = [word for key, value in values.items() if value is not None for word in _flag(key, value)]
    augmentation = stage.augmentation
    if augmentation is not None:
        if augmentation.scale is not None:
            low, high = augmentation.scale
            words += ["--aug-cfg", f"scale=({low},{high})"]
        words += ["--color-jitter"] if augmentation.color_jitter else []
    return words


def derived_words(
    words: Sequence[str], ours: argparse.Namespace, theirs: argparse.Namespace, world_size: int, gpu: bool
) -> list[str]:
    """Flags of OpenCLIP that follow from others, and its defaults where they are wrong for us.

    `words` is the whole argv, `ours` and `theirs` what the two parsers made of it; `world_size` and `gpu` say what
    the run will have. Raises UserError.
    """
    extra = _machine_words(words, theirs, gpu)
    if factory.is_ov2_model(theirs.model):
        # docs/reference.md: Adam b1 0.9, b2 0.95; eps is optax's default, 1e-8.
        for flag, value in (("--beta1", "0.9"), ("--beta2", "0.95"), ("--eps", "1e-8")):
            extra += [] if given(words, flag) else [flag, value]
    batch_size, accum_freq = _batch(words, ours, theirs, world_size)
    global_batch = batch_size * accum_freq * world_size
    extra += ["--batch-size", str(batch_size), "--accum-freq", str(accum_freq)]
    if last(words, "--base-lr") > last(words, "--lr"):
        extra += ["--lr", repr(ours.base_lr * global_batch / 256)]  # docs/reference.md, "Recipe"
    if last(words, "--warmup-samples") > last(words, "--warmup"):
        extra += ["--warmup", str(math.ceil(ours.warmup_samples / global_batch))]
    return extra


def _machine_words(words: Sequence[str], theirs: argparse.Namespace, gpu: bool) -> list[str]:
    cuda = gpu and theirs.device.startswith("cuda")
    extra: list[str] = []
    if not cuda and theirs.device.startswith("cuda") and not given(words, "--device"):
        extra += ["--device", "cpu"]
    if not given(words, "--precision"):
        family = factory.is_ov2_model(theirs.model)
        # OpenCLIP's `amp` (fp16) on a CPU runs without visible updates (docs/openclip.md).
        extra += ["--precision", ("amp_bf16" if family else "amp") if cuda else "fp32"]
    return extra


def _batch(
    words: Sequence[str], ours: argparse.Namespace, theirs: argparse.Namespace, world_size: int
) -> tuple[int, int]:
    """(images at once in each process, micro-batches in a step).

    Under a global batch, --batch-size is the most at once: the largest divisor up to it is taken.
    """
    total: int | None = ours.global_batch
    if total is None:
        return theirs.batch_size, theirs.accum_freq
    if total % world_size:
        raise UserError(f"global batch {total:,}: not divisible by {world_size} processes; change --global-batch")
    each = total // world_size
    if given(words, "--accum-freq"):
        accum_freq = max(1, theirs.accum_freq)
        if each % accum_freq or (given(words, "--batch-size") and theirs.batch_size * accum_freq != each):
            raise UserError(
                f"global batch {total:,} is {each:,} for each of {world_size} processes, which is not --accum-freq "
                f"{accum_freq} x --batch-size {theirs.batch_size}; leave one of the two out"
            )
        return each // accum_freq, accum_freq
    most = min(theirs.batch_size, each) if given(words, "--batch-size") else each
    size = max(size for size in range(1, max(1, most) + 1) if each % size == 0)
    return size, each // size
