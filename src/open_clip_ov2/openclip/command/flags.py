"""The flags of `ov2 train` that OpenCLIP does not have: their parser, and what it gives, frozen."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import Parser
from open_clip_ov2.core import FUSIONS, KeepRatio
from open_clip_ov2.data.captions import CaptionKey, parse_caption_keys
from open_clip_ov2.data.decode import MAX_IMAGE_PIXELS
from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe import parse_samples

DEFAULT_CAPTION_KEYS = "txt"
DECODE = ("fast", "exact")
FAMILY = "family"


@dataclass(frozen=True)
class TrainOptions:
    """What one stage trains with."""

    caption_keys: tuple[CaptionKey, ...]
    caption_keys_given: bool
    keep_ratio: KeepRatio | None
    eval_keep_ratio: float | None
    fusion: str | None
    tokenizer: str | None
    label_smoothing: float
    z_loss: float
    activation_memory_budget: float | None
    gradient_reduction: str
    color_jitter: bool
    decode: str | None
    augmentation: str | None
    max_image_pixels: int
    shuffle_buffer: int

    def model_options(self) -> dict[str, object]:
        """What `create_model` gets on top of the model's config."""
        given = {
            "keep_ratio": self.keep_ratio,
            "eval_keep_ratio": self.eval_keep_ratio,
            "fusion": self.fusion,
        }
        return {key: value for key, value in given.items() if value is not None}


@dataclass(frozen=True)
class RunOptions:
    """How a run is kept: saved, validated, watched. None of these changes what is trained."""

    save_every_steps: int | None
    save_every_minutes: float | None
    keep_checkpoints: int
    val_every_samples: int | None
    eval: str | None
    eval_every_samples: int | None
    max_bad_steps: int
    stall_warning: float
    sample_captions: int
    until_stage: int | None
    override: bool


def number(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> Callable[[str], float]:
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        fine = (value > low if open_low else value >= low) and (value < high if open_high else value <= high)
        if not fine or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} lies outside {interval}")
        return value

    return parse


def count(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return value

    return parse


def samples(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = parse_samples(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return value

    return parse


def _keep_ratio(text: str) -> KeepRatio:
    try:
        return KeepRatio.of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def build_parser() -> argparse.ArgumentParser:
    """Our flags alone."""
    parser = Parser(prog="ov2 train", add_help=False, usage=argparse.SUPPRESS)
    _add_schedule(parser.add_argument_group("stages (flags of ov2; all others are OpenCLIP's)"))
    _add_model(parser.add_argument_group("model and loss"))
    _add_data(parser.add_argument_group("data"))
    _add_keeping(parser.add_argument_group("checkpoints and watching"))
    return parser


def _add_schedule(group: Any) -> None:
    add = group.add_argument
    add("--recipe", type=Path, metavar="FILE.toml", help="stages and flags from a file; flags given here override it")
    add(
        "--stage",
        action="append",
        metavar="PX:samples=N,KEY=VALUE,...",
        help="one stage, repeatable: 112:samples=2M,base-lr=8e-6; what it does not say is the run's flag",
    )
    add(
        "--global-batch",
        type=count(1),
        metavar="N",
        help="images in one optimizer step, over all processes; --batch-size is then the most at once in each",
    )
    add("--base-lr", type=number(0, math.inf, open_high=True), metavar="LR", help="--lr = LR x global batch / 256")
    add("--warmup-samples", type=samples(0), metavar="N", help="--warmup in samples")
    add("--carry-optimizer", action="store_true", help="a stage goes on with the moments of the one before")
    add("--until-stage", type=count(1), metavar="K", help="stop, successfully, after stage K (from 1)")
    add("--override", action="store_true", help="go on with a run whose configuration differs from this one")


def _add_model(group: Any) -> None:
    add = group.add_argument
    add(
        "--keep-ratio",
        type=_keep_ratio,
        metavar="R|LOW:HIGH",
        help="share of patch tokens that the decoder gets, in (0, 1], or a range drawn from at each step "
        "(default: the model's, 0.35)",
    )
    add(
        "--eval-keep-ratio",
        type=number(0, 1, open_low=True),
        metavar="R",
        help="the same in evaluation and generation (default: as in training; the high end of a range)",
    )
    add("--fusion", choices=FUSIONS, help="how the decoder sees the image (default: prefix)")
    add(
        "--tokenizer",
        metavar="NAME|FOLDER",
        help="BERT word pieces with the reference's ids, from a hub name or a folder with vocab.txt "
        "(default: OpenCLIP's built-in tokenizer)",
    )
    add("--label-smoothing", type=number(0, 1, open_high=True), default=0.0, metavar="E", help="default: 0")
    add(
        "--z-loss",
        type=number(0, math.inf, open_high=True),
        default=0.0,
        metavar="W",
        help="weight of the squared log partition function (default: 0)",
    )
    add(
        "--activation-memory-budget",
        type=number(0, 1),
        metavar="F",
        help="with --torchcompile: the share of its activations that a block keeps; backward computes the rest again, "
        "what costs least time for its memory first (default: what torch.compile keeps, 1)",
    )
    add(
        "--gradient-reduction",
        choices=("fp32", "bf16"),
        default="fp32",
        help="in what gradients are summed between processes; bf16 sends half the bytes (default: fp32)",
    )


def _add_data(group: Any) -> None:
    add = group.add_argument
    add(
        "--caption-keys",
        metavar="KEY[=WEIGHT],...",
        default=None,
        help="where captions are: txt, json:dotted.path, a csv column; drawn by weight anew each time a sample "
        "is seen (default: txt; csv: --csv-caption-key)",
    )
    add("--color-jitter", action="store_true", help="the reference's colour jitter and grey, strength 0.4")
    add(
        "--decode",
        choices=DECODE,
        help="fast: training JPEGs at a reduced scale where the crop stays twice the resolution; exact: whole, as PIL "
        "has them. The crops are the same (default: fast; CLIP and CoCa: exact)",
    )
    add(
        "--augmentation",
        choices=(FAMILY,),
        help="family: the crop, interpolation, mean and std of ov2 models for any model, so that CLIP and CoCa see the "
        "same pixels (default: the model's own)",
    )
    add(
        "--max-image-pixels",
        type=count(1),
        default=MAX_IMAGE_PIXELS,
        metavar="N",
        help="larger images are skipped samples (default: %(default)s)",
    )
    add(
        "--shuffle-buffer",
        type=count(1),
        default=5000,
        metavar="N",
        help="samples in each data worker's shuffle buffer (default: %(default)s)",
    )
    add(
        "--stall-warning",
        type=number(0, math.inf, open_low=True, open_high=True),
        default=60.0,
        metavar="S",
        help="after S seconds without a batch, say which shard is being read (default: 60)",
    )


def _add_keeping(group: Any) -> None:
    add = group.add_argument
    add("--save-every-steps", type=count(1), metavar="N", help="a checkpoint every N steps, beside --save-frequency's")
    add(
        "--save-every-minutes",
        type=number(0, math.inf, open_low=True, open_high=True),
        metavar="M",
        help="a checkpoint every M minutes",
    )
    add(
        "--keep-checkpoints",
        type=count(1),
        default=3,
        metavar="K",
        help="the last K are kept, and the best, and each stage's end (default: %(default)s)",
    )
    add("--val-every-samples", type=samples(1), metavar="N", help="validate every N samples too (2M, 500k)")
    add(
        "--eval",
        metavar="'FLAGS'",
        help="tasks of `ov2 eval` at each validation, with its flags: --eval '--tasks knn --data D --train-data T'",
    )
    add(
        "--eval-every-samples", type=samples(1), metavar="N", help="--eval's tasks every N samples and at a stage's end"
    )
    add(
        "--sample-captions",
        type=count(0),
        default=8,
        metavar="N",
        help="held-out pictures captioned at each validation, for TensorBoard (default: %(default)s)",
    )
    add(
        "--max-bad-steps",
        type=count(1),
        default=10,
        metavar="N",
        help="stop after N steps in a row with a non-finite loss or gradient, which are left out (default: 10)",
    )


def train_options(ours: argparse.Namespace) -> TrainOptions:
    values = {field.name: getattr(ours, field.name) for field in fields(TrainOptions) if hasattr(ours, field.name)}
    values |= {
        "caption_keys": parse_caption_keys(ours.caption_keys or DEFAULT_CAPTION_KEYS),
        "caption_keys_given": ours.caption_keys is not None,
    }
    return TrainOptions(**values)


def run_options(ours: argparse.Namespace) -> RunOptions:
    return RunOptions(**{field.name: getattr(ours, field.name) for field in fields(RunOptions)})
