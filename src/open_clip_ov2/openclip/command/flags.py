"""The flags of `ov2 train` that OpenCLIP does not have. Each is a field of one of three frozen dataclasses, which says
how it is read and what `--help` prints."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from open_clip_ov2.argv import Parser, add_flags, flag, flag_values, switch_flag
from open_clip_ov2.core import FUSIONS, KeepRatio
from open_clip_ov2.core.compute import ENCODERS, FLOAT8
from open_clip_ov2.data.captions import CaptionKey, parse_caption_keys
from open_clip_ov2.data.decode import MAX_IMAGE_PIXELS
from open_clip_ov2.data.order.layout import Elastic, parse_elastic
from open_clip_ov2.data.sidecars import CaptionSet, caption_sets
from open_clip_ov2.openclip.models.preprocess import COLOR_JITTER_CFG
from open_clip_ov2.recipe.counts import sample_count
from open_clip_ov2.tables import one_of, real, text, whole

DECODE = ("fast", "exact")
SQUARE, NATIVE = "square", "native"
FAMILY = "family"
Options = TypeVar("Options")
_below_one = real(0, 1, below=True)


def val_caption_sets(value: str) -> tuple[CaptionSet, ...]:
    """`none` stands for no set at all."""
    return () if value == "none" else caption_sets(value)


@dataclass(frozen=True)
class ScheduleOptions:
    """Stages, and OpenCLIP's batch, learning rate and warm-up in other units."""

    recipe: Path | None = flag(
        "FILE.toml", Path, "read stages and flags from a file; flags on the command line override it"
    )
    stage: list[str] | None = flag(
        "PX:samples=N,KEY=VALUE,...",
        text,
        "one stage, repeatable: 112:samples=2M,base-lr=8e-6, or tokens=256:samples=2M with --aspect native; for keys "
        "that it does not set, the flags of the run apply",
        repeat=True,
    )
    global_batch: int | None = flag(
        "N",
        whole(1),
        "images in one optimizer step, over all processes; --batch-size is then the largest number at once in each",
    )
    base_lr: float | None = flag("LR", real(0), "set --lr to LR x global batch / 256")
    warmup_samples: int | None = flag("N", sample_count(0), "--warmup in samples (2M, 500k)")
    carry_optimizer: bool = switch_flag("keep the optimizer state when the next stage starts")


@dataclass(frozen=True)
class TrainOptions:
    """Model, loss and data of one stage."""

    keep_ratio: KeepRatio | None = flag(
        "R|LOW:HIGH",
        KeepRatio.of,
        "fraction of the patch tokens that the decoder sees, in (0, 1], or a range from which each step draws it "
        "(default: the model's, 0.35)",
    )
    eval_keep_ratio: float | None = flag(
        "R",
        real(0, 1, above=True),
        "the same in evaluation and generation (default: as in training; the high end of a range)",
    )
    fusion: str | None = flag(
        "|".join(FUSIONS), one_of(*FUSIONS), "how the decoder attends to the image (default: prefix)"
    )
    tokenizer: str | None = flag(
        "NAME|FOLDER",
        text,
        "BERT word pieces with the reference's ids, from a hub name or a folder with vocab.txt (default: OpenCLIP's "
        "built-in tokenizer)",
    )
    label_smoothing: float = flag("E", _below_one, "label smoothing of the caption loss", default=0.0)
    z_loss: float = flag("W", real(0), "weight of the squared log partition function", default=0.0)
    activation_memory_budget: float | None = flag(
        "F",
        real(0, 1),
        "with --torchcompile: the fraction of its activations that a block keeps for the backward pass; the others are "
        "recomputed (default: torch.compile's choice, 1)",
    )
    recompute_elementwise: bool = switch_flag(
        "keep less for the backward pass, which then computes norms and GELUs again, but no matrix product"
    )
    compile_encoder: str = flag(
        "|".join(ENCODERS),
        one_of(*ENCODERS),
        "with --torchcompile: compile the vision tower block by block, as one graph, or as one that CUDA graphs replay",
        default="blocks",
    )
    attention_kernel: str | None = flag(
        "FA3|FA4",
        one_of("FA3", "FA4"),
        "use this FlashAttention, from a package of its own, for attention (default: the fastest that torch brings)",
    )
    fp8: str | None = flag(
        "|".join(FLOAT8),
        one_of(*FLOAT8),
        "compute the matrix products of the vision tower's blocks in float8; emulated runs without such units, slowly",
    )
    gradient_reduction: str = flag(
        "fp32|bf16",
        one_of("fp32", "bf16"),
        "data type in which processes sum their gradients; bf16 sends half the bytes",
        default="fp32",
    )
    ema_decay: float | None = flag(
        "D",
        _below_one,
        "keep an exponential moving average of the weights with this decay (0.9998); checkpoints and validations are "
        "then of the average",
    )
    lr_layer_decay: float | None = flag(
        "F",
        real(0, 1, above=True),
        "multiply the learning rate of a block of the vision tower by F for each block above it, and once more",
    )
    wd_exclude: Sequence[str] = flag(
        "PATTERN", text, "no weight decay for parameters whose names match ('*.bias')", default=(), several=True
    )
    freeze: Sequence[str] = flag(
        "PATTERN", text, "do not train parameters whose names match ('text_decoder.*')", default=(), several=True
    )
    lora_rank: int | None = flag(
        "R",
        whole(1),
        "freeze the vision tower and train LoRA adapters of this rank in its blocks; checkpoints have them merged",
    )
    lora_alpha: float | None = flag(
        "A", real(0, above=True), "the adapters are scaled by A / R (default: R, which makes it 1)"
    )
    tokens_per_step: int | None = flag(
        "N",
        sample_count(1),
        "a step takes batches until they have N target tokens over all processes (50k); the schedule counts batches",
    )
    caption_keys: tuple[CaptionKey, ...] = flag(
        "KEY[=WEIGHT],...",
        parse_caption_keys,
        "where captions are: txt, json:dotted.path, a csv column; one is drawn by weight each time a sample is read "
        "(default: txt; csv: --csv-caption-key)",
    )
    prompt_keys: tuple[CaptionKey, ...] | None = flag(
        "KEY[=WEIGHT],...",
        parse_caption_keys,
        "train a captioner that is given text: what stands there comes before the caption and is not to be predicted; "
        "`none=W` is the weight of no text (ov2 models; default: no text)",
    )
    captions: tuple[CaptionSet, ...] = flag(
        "NAME=FOLDER",
        caption_sets,
        "captions beside the tars, repeatable: a folder of `ov2 captions` with NAME.jsonl.gz for each NAME.tar, or an "
        "address with {shard}; --caption-keys NAME:caption",
        repeat=True,
    )
    val_captions: tuple[CaptionSet, ...] = flag(
        "NAME=FOLDER|none", val_caption_sets, "the same for --val-data (default: --captions)", repeat=True
    )
    color_jitter: bool = switch_flag("color jitter and gray images as in the reference, strength 0.4")
    decode: str | None = flag(
        "|".join(DECODE),
        one_of(*DECODE),
        "fast: decode training JPEGs at a reduced scale where the crop stays at least twice the resolution; exact: "
        "decode them whole, as PIL does. The crops are the same (default: fast; CLIP and CoCa: exact)",
    )
    aspect: str | None = flag(
        f"{SQUARE}|{NATIVE}",
        one_of(SQUARE, NATIVE),
        "native: images keep their shapes; each is resized to at most --max-tokens patches, and batches have no "
        "padding (ov2 models; default: square, or native in a stage of tokens=N)",
    )
    max_tokens: int | None = flag(
        "N",
        whole(1),
        "with --aspect native: image tokens of one image at most, so --batch-size times as many of a batch (default: "
        "as many as a square of the model's resolution has)",
    )
    augmentation: str | None = flag(
        FAMILY,
        one_of(FAMILY),
        "family: use the crop, interpolation, mean and std of ov2 models with any model, so that CLIP and CoCa see the "
        "same pixels (default: the model's own)",
    )
    max_image_pixels: int = flag("N", whole(1), "skip images with more pixels", default=MAX_IMAGE_PIXELS)
    shuffle_buffer: int = flag(
        "N",
        whole(1),
        "samples in the shuffle buffer of each data worker, or with --elastic of each stream",
        default=5000,
    )
    elastic: Elastic | None = flag(
        "PROCESSESxWORKERS",
        parse_elastic,
        "the same global batches on any number of processes that divides PROCESSES, with any number of --workers that "
        "divides WORKERS: the data is read as PROCESSES x WORKERS streams (64x8)",
    )
    caption_keys_given: bool = False  # whether a csv file's own --csv-caption-key is overridden

    def aug_cfg(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """--aug-cfg, on top of what --color-jitter stands for."""
        return {**(COLOR_JITTER_CFG if self.color_jitter else {}), **(given or {})}

    def model_options(self) -> dict[str, Any]:
        """What `create_model` gets on top of the model's config."""
        given = {"keep_ratio": self.keep_ratio, "eval_keep_ratio": self.eval_keep_ratio, "fusion": self.fusion}
        return {key: value for key, value in given.items() if value is not None}


@dataclass(frozen=True)
class RunOptions:
    """Processes, checkpoints, validation and progress. None of these changes what is trained, but for rounding."""

    fsdp: bool = switch_flag("shard the model over the processes, block by block (torch's FSDP2), instead of DDP")
    fsdp_hybrid: int | None = flag(
        "N",
        whole(2),
        "with --fsdp: shard within groups of N processes, those of one node, and replicate between the groups",
    )
    fsdp_checkpoint: str = flag(
        "full|sharded",
        one_of("full", "sharded"),
        "sharded: between the ends of stages, each process writes its part of a checkpoint, in the background, to one "
        "folder (`ov2 convert` makes a file of it; default: full, one file)",
        default="full",
    )
    save_every_steps: int | None = flag(
        "N", whole(1), "write a checkpoint every N steps, in addition to --save-frequency"
    )
    save_every_minutes: float | None = flag("M", real(0, above=True), "write a checkpoint every M minutes")
    keep_checkpoints: int = flag(
        "K", whole(1), "keep the last K checkpoints, the best one, and each stage's last", default=3
    )
    val_every_samples: int | None = flag("N", sample_count(1), "validate every N samples too (2M, 500k)")
    eval: str | None = flag(
        "'FLAGS'",
        text,
        "run tasks of `ov2 eval` at each validation, with its flags: --eval '--tasks knn --data D --train-data T'",
    )
    eval_every_samples: int | None = flag(
        "N", sample_count(1), "run the tasks of --eval every N samples and at the end of a stage instead"
    )
    sample_captions: int = flag(
        "N", whole(0), "caption N held-out images at each validation for --report-to's trackers", default=8
    )
    max_bad_steps: int = flag(
        "N",
        whole(1),
        "stop after N consecutive steps with a non-finite loss or gradient; such steps change no weight",
        default=10,
    )
    stall_warning: float = flag(
        "S", real(0, above=True), "after S seconds without a batch, log the shard that is being read", default=60.0
    )
    until_stage: int | None = flag("K", whole(1), "end the run successfully after stage K (counted from 1)")
    override: bool = switch_flag("continue a run although its configuration has changed")


def build_parser() -> Parser:
    """A parser of our flags alone."""
    parser = Parser(prog="ov2 train", add_help=False, usage=argparse.SUPPRESS)
    add_flags(parser.add_argument_group("stages"), ScheduleOptions)
    add_flags(parser.add_argument_group("model, loss and data"), TrainOptions)
    add_flags(parser.add_argument_group("checkpoints, validation and progress"), RunOptions)
    return parser


def options(kind: type[Options], parsed: argparse.Namespace) -> Options:
    """The part of the parsed flags that is declared in `kind`."""
    values = flag_values(kind, parsed)
    if kind is TrainOptions:
        values["caption_keys_given"] = values["caption_keys"] is not None
        values["caption_keys"] = values["caption_keys"] or parse_caption_keys("txt")
        values["captions"] = caption_sets(values["captions"] or ())
        val = values["val_captions"]
        values["val_captions"] = values["captions"] if val is None else caption_sets(val)
    return kind(**values)
