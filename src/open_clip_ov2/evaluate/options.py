"""What an evaluation is asked for: the flags of `ov2 eval`, which `ov2 train --eval` takes too."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_clip_ov2.core.generate import GENERATION_TYPES
from open_clip_ov2.data.captions import CaptionKey, parse_caption_keys
from open_clip_ov2.data.shards import WebDatasetSource, check_shards_exist, expand_shards
from open_clip_ov2.data.sources import ImageFolderSource, Source
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.classes import TEMPLATES, Classes
from open_clip_ov2.evaluate.text.answering import PLACE
from open_clip_ov2.evaluate.text.question_answering import RULES

GENERATION = ("generation_type", "num_beams", "top_k", "top_p", "temperature", "seq_len", "keep_ratio")
KEEP_RATIOS = (1.0, 0.5, 0.35, 0.25, 0.1)  # of the robustness curve; 0.35 and 0.25 are the paper's


@dataclass(frozen=True)
class EvalOptions:
    """`guess`: chance of a right guess for each kind of picture. `generation`: CaptionModel.generate's options."""

    data: str
    tasks: str
    train_data: str | None = None
    caption_keys: tuple[CaptionKey, ...] = (CaptionKey("txt"),)
    label_key: CaptionKey | None = None
    group_by: CaptionKey | None = None
    guess: Mapping[str, float] = field(default_factory=dict)
    questions: Path | None = None
    question_images: Path | None = None
    question_rule: str = "exact"
    prompt: str = PLACE
    classes: Classes | None = None
    templates: tuple[str, ...] = TEMPLATES
    length_normalise: bool = False
    keep_ratio: float | None = None
    keep_ratios: tuple[float, ...] = ()  # KEEP_RATIOS, as far as they keep a token
    image_sizes: tuple[int, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    workers: int = 0
    cache: Path | None = None
    feature_disk: Path | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{self.prog}: {message} (`ov2 eval --help` lists the flags)")


def options_of(text: str, what: str) -> EvalOptions:
    """From a string of `ov2 eval`'s flags, as `ov2 train --eval` has it. Raises UserError that names `what`."""
    parser = _Parser(prog=what, add_help=False, allow_abbrev=False)
    add_eval_flags(parser)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{what}: {error} in {text!r}") from None
    return eval_options(parser.parse_args(words))


def add_eval_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data", required=True, metavar="DATA", help="tars, as for ov2 train --val-data, or a folder CLASS/picture.jpg"
    )
    add("--tasks", default="all", metavar="A,B,...", help="what to evaluate (default: all that model and data allow)")
    add("--caption-keys", default="txt", help="default: %(default)s")
    add("--label-key", metavar="ENTRY[:FIELD]", help="class of a picture: cls, json:label (a folder's: the class)")
    add("--group-by", metavar="ENTRY[:FIELD]", help="read-text by the value of this, json:kind")
    add("--guess", type=Path, metavar="FILE.json", help="chance of a right guess for each of these groups")
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--workers", type=int, default=0, help="default: %(default)s")
    _add_classes(parser.add_argument_group("classes and probes").add_argument)
    _add_questions(parser.add_argument_group("questions").add_argument)
    group = parser.add_argument_group("robustness").add_argument
    group("--keep-ratios", type=_numbers, default=(), metavar="R,R,...", help="default: 1,0.5,0.35,0.25,0.1")
    group(
        "--image-sizes", type=_sizes, default=(), metavar="PX,PX,...", help="resolutions (default: the model's alone)"
    )
    add_generation(parser)


def _add_classes(add: Any) -> None:
    add("--train-data", metavar="DATA", help="labelled, for linear-probe, knn and attentive-probe")
    add("--cache", type=Path, metavar="FOLDER", help="keep features here")
    add("--feature-disk", type=Path, metavar="FOLDER", help="features lie here while used, for what memory cannot hold")
    add("--classes", type=Path, metavar="FILE.json", help="[names] or {label: name} (default: the labels of --data)")
    add("--templates", type=Path, metavar="FILE.json", help='["a photo of a {}.", ...] (default: "a photo of a {}.")')
    add("--length-normalise", action="store_true", help="likelihoods a token, not a caption")


def _add_questions(add: Any) -> None:
    add("--questions", type=Path, metavar="FILE", help="JSON lines, or the files of TextVQA, ChartQA, OCRBench, DocVQA")
    add("--question-images", type=Path, metavar="FOLDER", help="default: beside FILE")
    add("--question-rule", choices=sorted(RULES), default="exact", help="where FILE names none (default: exact)")
    add("--prompt", default=PLACE, help="text before the answer (default: %(default)s)")


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Flags of CaptionModel.generate."""
    parser.add_argument("--keep-ratio", type=float, metavar="R", help="default: the model's at evaluation")
    add = parser.add_argument_group("generation").add_argument
    add("--generation-type", choices=GENERATION_TYPES, default="greedy", help="default: %(default)s")
    add("--num-beams", type=int, default=4, help="for beam_search (default: %(default)s)")
    add("--top-k", type=int, default=50, help="for top_k (default: %(default)s)")
    add("--top-p", type=float, default=0.9, help="for top_p (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="for top_k and top_p (default: %(default)s)")
    add("--seq-len", type=int, help="longest caption in tokens (default: the context length)")


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in GENERATION}


def eval_options(args: argparse.Namespace) -> EvalOptions:
    """Raises UserError for a file that is missing or is not what it should be."""
    if args.batch_size < 1 or args.workers < 0:
        raise UserError("--batch-size is at least 1, --workers at least 0")
    templates = tuple(_json(args.templates, list, "a list of texts")) if args.templates else TEMPLATES
    wrong = [text for text in templates if not isinstance(text, str) or "{}" not in text]
    if wrong:
        raise UserError(f"{args.templates}: {wrong[0]!r} is no text with {{}} in it, where the class goes")
    if args.keep_ratio is not None and not 0 < args.keep_ratio <= 1:
        raise UserError(f"--keep-ratio {args.keep_ratio:g}: a share in (0, 1] is wanted")
    for flag, folder in (("--cache", args.cache), ("--feature-disk", args.feature_disk)):
        if folder is not None and not _can_hold(folder):
            raise UserError(f"{flag} {folder}: no folder that can be written to")
    guess = _json(args.guess, dict, "an object of numbers") if args.guess else {}
    if not all(isinstance(chance, (int, float)) and 0 < chance <= 1 for chance in guess.values()):
        raise UserError(f"{args.guess}: chances in (0, 1] are wanted")
    return EvalOptions(
        data=args.data,
        tasks=args.tasks,
        train_data=args.train_data,
        caption_keys=parse_caption_keys(args.caption_keys),
        label_key=_key("--label-key", args.label_key),
        group_by=_key("--group-by", args.group_by),
        guess=guess,
        questions=args.questions,
        question_images=args.question_images,
        question_rule=args.question_rule,
        prompt=args.prompt,
        classes=Classes.read(args.classes) if args.classes else None,
        templates=templates,
        length_normalise=args.length_normalise,
        keep_ratio=args.keep_ratio,
        keep_ratios=args.keep_ratios,
        image_sizes=args.image_sizes,
        generation=generation_options(args),
        batch_size=args.batch_size,
        workers=args.workers,
        cache=args.cache,
        feature_disk=args.feature_disk,
    )


def _can_hold(folder: Path) -> bool:
    """Whether it is a folder that can be written to, or can be made."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    return there.is_dir() and os.access(there, os.W_OK)


def source_of(text: str) -> Source:
    """A folder of classes, or tars. Raises UserError."""
    if os.path.isdir(text):  # which no name is too long for
        return ImageFolderSource(Path(text))
    urls, _ = expand_shards(text)
    check_shards_exist(urls)
    return WebDatasetSource(urls=urls, weights=None, resampled=False)


def _key(flag: str, text: str | None) -> CaptionKey | None:
    if text is None:
        return None
    try:
        keys = parse_caption_keys(text)
    except UserError as error:
        raise UserError(f"{flag}: {str(error).removeprefix('--caption-keys: ')}") from None
    if len(keys) > 1:
        raise UserError(f"{flag}: {text!r} names {len(keys)} places; one is wanted")
    return keys[0]


def _json(path: Path, kind: Any, wanted: str) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(found, kind) or not found:
        raise UserError(f"{path}: {wanted} is wanted")
    return found


def _numbers(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: shares in (0, 1] are wanted")
    return values


def _sizes(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in text.split(","))
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text}: sizes in pixels are wanted")
    return values
