"""Flags of OpenCLIP that follow from other flags: the only place where batch, learning rate and warm-up of a stage are
computed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from open_clip_ov2.argv import is_given, last
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.models import factory
from open_clip_ov2.recipe.counts import largest_divisor

LR_BATCH = 256  # lr = base_lr x global batch / 256 (docs/reference.md, "Recipe")


def one_aug_cfg(argv: Sequence[str]) -> list[str]:
    """argv with all its --aug-cfg in one, since OpenCLIP takes only the last of them, and a recipe's crop scale is one.
    Of equal keys the last counts."""
    rest, found, inside = [], {}, False
    for word in argv:
        if word.startswith("--"):
            inside = word.split("=")[0] == "--aug-cfg"
            word = word.partition("=")[2] if inside else word
        if not inside:
            rest.append(word)
        elif word:
            found[word.partition("=")[0]] = word
    return [*rest, "--aug-cfg", *found.values()] if found else rest


def derived_flags(
    argv: Sequence[str], ours: argparse.Namespace, theirs: argparse.Namespace, world_size: int, gpu: bool
) -> list[str]:
    """Flags of OpenCLIP that follow from others, and those of its defaults that are wrong for us. `ours` and `theirs`
    are what the two parsers made of the whole `argv`; `world_size` and `gpu` are what the run will have. Raises
    UserError."""
    is_ov2, cuda = factory.is_ov2_model(theirs.model), gpu and theirs.device.startswith("cuda")
    extra: list[str] = []
    if not cuda and theirs.device.startswith("cuda") and not is_given(argv, "--device"):
        extra += ["--device", "cpu"]
    if not is_given(argv, "--precision"):
        # OpenCLIP's `amp` (fp16) on a CPU runs without visible updates (docs/openclip.md).
        extra += ["--precision", ("amp_bf16" if is_ov2 else "amp") if cuda else "fp32"]
    if is_ov2:  # docs/reference.md: Adam b1 0.9, b2 0.95; eps is optax's default, 1e-8
        for flag, value in (("--beta1", "0.9"), ("--beta2", "0.95"), ("--eps", "1e-8")):
            extra += [] if is_given(argv, flag) else [flag, value]
    batch_size, accum_freq = _batch(argv, ours, theirs, world_size)
    global_batch = batch_size * accum_freq * world_size
    extra += ["--batch-size", str(batch_size), "--accum-freq", str(accum_freq)]
    if last(argv, "--base-lr") > last(argv, "--lr"):
        extra += ["--lr", repr(ours.base_lr * global_batch / LR_BATCH)]
    if last(argv, "--warmup-samples") > last(argv, "--warmup"):
        extra += ["--warmup", str(math.ceil(ours.warmup_samples / global_batch))]
    return extra


def _batch(
    argv: Sequence[str], ours: argparse.Namespace, theirs: argparse.Namespace, world_size: int
) -> tuple[int, int]:
    """(images at once in each process, micro-batches in a step). Under a global batch, --batch-size is the largest
    number at once: the largest divisor up to it is taken."""
    total: int | None = ours.global_batch
    if total is None:
        return theirs.batch_size, theirs.accum_freq
    if total % world_size:
        raise UserError(f"global batch {total:,}: not divisible by {world_size} processes; change --global-batch")
    each, size_given = total // world_size, is_given(argv, "--batch-size")
    if is_given(argv, "--accum-freq"):
        accum_freq = max(1, theirs.accum_freq)
        if each % accum_freq or (size_given and theirs.batch_size * accum_freq != each):
            raise UserError(
                f"global batch {total:,} is {each:,} for each of {world_size} processes, which is not --accum-freq "
                f"{accum_freq} x --batch-size {theirs.batch_size}; leave one of the two out"
            )
        return each // accum_freq, accum_freq
    size = largest_divisor(each, theirs.batch_size if size_given else each)
    return size, each // size
