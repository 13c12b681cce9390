"""argv in, two things out: our options (frozen), and the argv that OpenCLIP's own parser gets."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from open_clip_train.params import parse_args as open_clip_parse_args

from open_clip_ov2.core import FUSIONS, KeepRatio
from open_clip_ov2.data.captions import CaptionKey, parse_caption_keys
from open_clip_ov2.data.samples import MAX_IMAGE_PIXELS
from open_clip_ov2.errors import UserError
from open_clip_ov2.seam import factory

DEFAULT_CAPTION_KEYS = "txt"


@dataclass(frozen=True)
class TrainOptions:
    """The flags of `ov2 train` that OpenCLIP does not have."""

    caption_keys: tuple[CaptionKey, ...]
    caption_keys_given: bool
    keep_ratio: KeepRatio | None
    eval_keep_ratio: float | None
    fusion: str | None
    tokenizer: str | None
    label_smoothing: float
    z_loss: float
    color_jitter: bool
    max_image_pixels: int
    sample_captions: int
    shuffle_buffer: int

    def model_options(self) -> dict[str, object]:
        """What `create_model` gets on top of the model's config."""
        given = {
            "keep_ratio": self.keep_ratio,
            "eval_keep_ratio": self.eval_keep_ratio,
            "fusion": self.fusion,
        }
        return {key: value for key, value in given.items() if value is not None}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"ov2 train: {message}")


def _number(low: float, high: float, *, open_low: bool = False, open_high: bool = False):
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


def _count(low: int):
    def parse(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
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
    parser = _Parser(prog="ov2 train", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    group = parser.add_argument_group("flags of ov2 (all others are OpenCLIP's)")
    add = group.add_argument
    add(
        "--caption-keys",
        metavar="KEY[=WEIGHT],...",
        default=None,
        help="where captions are: txt, json:dotted.path, a csv column; drawn by weight anew each time a sample "
        "is seen (default: txt; csv: --csv-caption-key)",
    )
    add(
        "--keep-ratio",
        type=_keep_ratio,
        metavar="R|LOW:HIGH",
        help="share of patch tokens that the decoder gets, in (0, 1], or a range drawn from at each step "
        "(default: the model's, 0.35)",
    )
    add(
        "--eval-keep-ratio",
        type=_number(0, 1, open_low=True),
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
    add("--label-smoothing", type=_number(0, 1, open_high=True), default=0.0, metavar="E", help="default: 0")
    add(
        "--z-loss",
        type=_number(0, math.inf, open_high=True),
        default=0.0,
        metavar="W",
        help="weight of the squared log partition function (default: 0)",
    )
    add("--color-jitter", action="store_true", help="the reference's colour jitter and grey, strength 0.4")
    add(
        "--max-image-pixels",
        type=_count(1),
        default=MAX_IMAGE_PIXELS,
        metavar="N",
        help="larger images are skipped samples (default: %(default)s)",
    )
    add(
        "--sample-captions",
        type=_count(0),
        default=8,
        metavar="N",
        help="held-out pictures captioned at each validation, for TensorBoard (default: %(default)s)",
    )
    add(
        "--shuffle-buffer",
        type=_count(1),
        default=5000,
        metavar="N",
        help="samples in each data worker's shuffle buffer (default: %(default)s)",
    )
    return parser


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """OpenCLIP's parser prints its whole usage and exits; we want the last line, as a UserError."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            yield
    except SystemExit as error:
        if not error.code:
            raise
        message = captured.getvalue().strip().splitlines()[-1:] or ["bad arguments"]
        text = message[0].split("error: ", 1)[-1]
        raise UserError(f"ov2 train: {text} (`ov2 train --help` lists the flags)") from None


def parse(argv: Sequence[str]) -> tuple[TrainOptions, argparse.Namespace, list[str]]:
    """(our options, OpenCLIP's namespace, OpenCLIP's argv with our defaults). Raises UserError."""
    ours, rest = build_parser().parse_known_args(list(argv))
    with one_line_errors():
        theirs = open_clip_parse_args(rest)
    check_model_name(theirs.model, given=_given(rest, "--model"))
    rest = rest + _defaults(theirs, rest)
    with one_line_errors():
        theirs = open_clip_parse_args(rest)
    options = TrainOptions(
        caption_keys=parse_caption_keys(ours.caption_keys or DEFAULT_CAPTION_KEYS),
        caption_keys_given=ours.caption_keys is not None,
        **{key: value for key, value in vars(ours).items() if key != "caption_keys"},
    )
    _check(options, theirs)
    return options, theirs, rest


def _given(argv: Sequence[str], flag: str) -> bool:
    return any(word == flag or word.startswith(flag + "=") for word in argv)


def check_model_name(name: str, given: bool = True) -> None:
    if not given:
        raise UserError("ov2 train: --model is missing, for example --model ov2-vit-l-14")
    if ":" in name or name in factory.known_models():
        return
    near = get_close_matches(name, factory.known_models(), n=3, cutoff=0.5)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise UserError(f"--model {name}: no such model{hint} (open_clip.list_models() lists them)")


def _defaults(theirs: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """Where OpenCLIP's default is wrong for the family or for a machine without a GPU."""
    cuda = torch.cuda.is_available() and theirs.device.startswith("cuda")
    extra: list[str] = []
    if not cuda and theirs.device.startswith("cuda") and not _given(rest, "--device"):
        extra += ["--device", "cpu"]
    if not _given(rest, "--precision"):
        family = factory.is_family(theirs.model)
        # OpenCLIP's `amp` (fp16) on a CPU runs without visible updates (docs/openclip.md).
        extra += ["--precision", ("amp_bf16" if family else "amp") if cuda else "fp32"]
    if factory.is_family(theirs.model):
        # docs/reference.md: Adam b1 0.9, b2 0.95; eps is optax's default, 1e-8.
        for flag, value in (("--beta1", "0.9"), ("--beta2", "0.95"), ("--eps", "1e-8")):
            if not _given(rest, flag):
                extra += [flag, value]
    return extra


def _check(options: TrainOptions, theirs: argparse.Namespace) -> None:
    family = factory.is_family(theirs.model)
    on_cpu = theirs.device == "cpu" or not torch.cuda.is_available()
    if theirs.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {theirs.device}: no CUDA device here; leave the flag out to run on the CPU")
    if on_cpu and theirs.precision in ("amp", "fp16", "pure_fp16"):
        raise UserError(f"--precision {theirs.precision} needs a GPU; on a CPU use amp_bf16 or fp32")
    if not theirs.train_data and not theirs.val_data and theirs.dataset_type != "synthetic":
        raise UserError("ov2 train: --train-data is missing, for example --train-data 'shards/{00000..00999}.tar'")
    for flag in ("batch_size", "accum_freq", "epochs", "log_every_n_steps"):
        if getattr(theirs, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(theirs, flag)}")
    if theirs.workers < 0:
        raise UserError(f"--workers must be at least 0, got {theirs.workers}")
    unknown = set(theirs.report_to.split(",")) - {"", "tensorboard"}
    if unknown:
        raise UserError(f"--report-to {theirs.report_to}: ov2 writes tensorboard and results.jsonl, nothing else")
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


def _check_baseline(options: TrainOptions, theirs: argparse.Namespace) -> None:
    given = {
        "--keep-ratio": options.keep_ratio,
        "--eval-keep-ratio": options.eval_keep_ratio,
        "--fusion": options.fusion,
        "--tokenizer": options.tokenizer,
        "--label-smoothing": options.label_smoothing,
        "--z-loss": options.z_loss,
        "--color-jitter": options.color_jitter,
    }
    for flag, value in given.items():
        if value:
            raise UserError(f"{flag} is for ov2 models, and --model is {theirs.model}")


def help_text() -> str:
    """Our flags, then OpenCLIP's."""
    ours = build_parser().format_help()
    captured = io.StringIO()
    with contextlib.redirect_stdout(captured), contextlib.suppress(SystemExit):
        open_clip_parse_args(["--help"])
    theirs = captured.getvalue()
    options = theirs[theirs.find("option") :]
    return f"usage: ov2 train --model MODEL --train-data SHARDS [flags]\n\n{ours}\nflags of OpenCLIP\n{options}"
