"""What an evaluation is asked for: the flags of `ov2 eval` and `ov2 caption`, each declared once.

The same names are the keyword arguments of `open_clip_ov2.evaluate`, and stand in the text of `ov2 train --eval`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from open_clip_ov2.argv import Parser, add_flags, flag, switch_flag
from open_clip_ov2.core.generate import GENERATION_TYPES
from open_clip_ov2.data.captions import CaptionKey, parse_caption_keys
from open_clip_ov2.data.shards import WebDatasetSource, expand_shards
from open_clip_ov2.data.sidecars import CaptionSet, caption_sets
from open_clip_ov2.data.sources import ImageFolderSource, Source
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.answering import PLACE
from open_clip_ov2.evaluate.classes import TEMPLATES, Classes
from open_clip_ov2.evaluate.text.question_answering import RULES
from open_clip_ov2.files import read_json
from open_clip_ov2.tables import comma_separated, from_table, one_of, real, text, whole

Options = TypeVar("Options")
ALL = "all"


def _path(value: Any) -> Path:
    return Path(text(os.fspath(value) if isinstance(value, os.PathLike) else value))


def _folder(value: Any) -> Path:
    """A folder that can be written to, or can be made."""
    folder = _path(value)
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{folder}: not a folder that can be written to")
    return folder


def _caption_keys(value: Any) -> tuple[CaptionKey, ...]:
    return value if isinstance(value, tuple) else parse_caption_keys(text(value))


def _key(value: Any) -> CaptionKey:
    """The one place of a label or group."""
    keys = (value,) if isinstance(value, CaptionKey) else _caption_keys(value)
    if len(keys) > 1:
        raise UserError(f"{value!r} names {len(keys)} places; expected one")
    return keys[0]


def _guess(value: Any) -> dict[str, float]:
    table = value if isinstance(value, Mapping) else read_json(_path(value), dict, "an object of numbers in (0, 1]")
    return {str(kind): SHARE(chance) for kind, chance in table.items()}


def _templates(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, (list, tuple)) else read_json(_path(value), list, "a list of texts")
    wrong = [one for one in texts if not isinstance(one, str) or "{}" not in one]
    if wrong or not texts:
        raise UserError(f"expected a list of texts with {{}} where the class goes, got {(wrong or [texts])[0]!r}")
    return tuple(texts)


def _classes(value: Any) -> Classes:
    if isinstance(value, Classes):
        return value
    return Classes.of(value) if isinstance(value, (list, tuple, dict)) else Classes.read(_path(value))


def _tasks(value: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = comma_separated(text)(value)
    return () if ALL in names else names


SHARE = real(0, 1, above=True)
GENERATION, PROBES, QUESTIONS, ROBUSTNESS = "generation", "classes and probes", "questions", "robustness"


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How captions are generated; `seq_len` counts tokens."""

    keep_ratio: float | None = flag("R", SHARE, "share of image tokens kept (default: the model's in evaluation)")
    aspect: str | None = flag(
        "square|native",
        one_of("square", "native"),
        "native: images keep their shapes, as with `ov2 train --aspect native` (default: as the model was trained)",
    )
    max_tokens: int | None = flag(
        "N", whole(1), "with native: tokens of one image at most (default: as in training, or as many as a square)"
    )
    generation_type: str = flag(
        "NAME", one_of(*GENERATION_TYPES), "how tokens are chosen", default="greedy", group=GENERATION
    )
    num_beams: int = flag("N", whole(1), "beams of beam_search", default=4, group=GENERATION)
    top_k: int = flag("N", whole(1), "tokens that top_k chooses among", default=50, group=GENERATION)
    top_p: float = flag("P", SHARE, "probability that top_p chooses among", default=0.9, group=GENERATION)
    temperature: float = flag("T", real(0, above=True), "for top_k and top_p", default=1.0, group=GENERATION)
    seq_len: int | None = flag(
        "N", whole(2), "longest caption in tokens (default: the context length)", group=GENERATION
    )

    @property
    def generation(self) -> dict[str, Any]:
        """Options of CaptionModel.generate."""
        names = [one.name for one in fields(GenerationOptions) if one.metadata["shown"].group == GENERATION]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(GenerationOptions):
    """What else `ov2 caption` can be asked for."""

    num_captions: int = flag("N", whole(1), "up to N different captions of an image, likeliest first", default=1)
    draws: int = flag(
        "N", whole(1), "draw the kept tokens N times, and rank captions by their mean log-likelihood", default=1
    )
    log_likelihood: bool = switch_flag("print the log-likelihood of each caption, in nats")
    show_tokens: bool = switch_flag("on the sheet, gray out the patches that the decoder does not see")

    @property
    def scored(self) -> bool:
        """Whether captions are ranked by their log-likelihood."""
        return self.log_likelihood or self.num_captions > 1 or self.draws > 1


@dataclass(frozen=True, kw_only=True)
class EvalOptions(GenerationOptions):
    """`guess`: the chance of a right guess by kind of image. No `tasks` means all that can be done."""

    data: str = flag("DATA", text, "tars, as for ov2 train --val-data, or a folder CLASS/image.jpg", default=MISSING)
    tasks: tuple[str, ...] = flag(
        "A,B,...", _tasks, "what to evaluate (default: all that model and data allow)", default=()
    )
    caption_keys: tuple[CaptionKey, ...] = flag("KEYS", _caption_keys, "default: txt", default=(CaptionKey("txt"),))
    captions: tuple[CaptionSet, ...] = flag(
        "NAME=FOLDER", caption_sets, "captions beside the tars of --data, as for ov2 train", default=(), repeat=True
    )
    label_key: CaptionKey | None = flag("ENTRY[:FIELD]", _key, "class of an image: cls, json:label")
    group_by: CaptionKey | None = flag("ENTRY[:FIELD]", _key, "report by the value of this, json:kind")
    guess: Mapping[str, float] | None = flag("FILE.json", _guess, "chance of a right guess by group")
    batch_size: int = flag("N", whole(1), "images at a time", default=64)
    workers: int = flag("N", whole(0), "data workers", default=0)
    train_data: str | None = flag(
        "DATA", text, "data to train probes on, labelled or for read-probe captioned", group=PROBES
    )
    cache: Path | None = flag("FOLDER", _folder, "keep features in this folder, and read them from it", group=PROBES)
    feature_disk: Path | None = flag(
        "FOLDER", _folder, "memory-map features in this folder instead of RAM", group=PROBES
    )
    classes: Classes | None = flag(
        "FILE.json", _classes, "[names] or {label: name} (default: the labels of --data)", group=PROBES
    )
    templates: tuple[str, ...] = flag(
        "FILE.json", _templates, 'texts (default: "a photo of a {}.")', default=TEMPLATES, group=PROBES
    )
    length_normalise: bool = switch_flag("likelihood per token, not per caption", group=PROBES)
    read_samples: int = flag("N", whole(1), "samples that a decoder of read-probe sees", default=6_000, group=PROBES)
    read_seeds: int = flag("N", whole(1), "decoders of read-probe", default=3, group=PROBES)
    read_width: int = flag("N", whole(1), "their width in channels", default=128, group=PROBES)
    read_layers: int = flag("N", whole(1), "their pairs of self- and cross-attention", default=2, group=PROBES)
    read_batch: int = flag("N", whole(1), "their batch", default=16, group=PROBES)
    read_lr: float = flag("R", real(0, above=True), "their peak learning rate", default=0.002, group=PROBES)
    questions: Path | None = flag(
        "FILE", _path, "JSON lines, or a file of TextVQA, ChartQA, OCRBench or DocVQA", group=QUESTIONS
    )
    question_images: Path | None = flag("FOLDER", _path, "default: the folder of FILE", group=QUESTIONS)
    question_rule: str = flag("NAME", one_of(*RULES), "rule where FILE names none", default="exact", group=QUESTIONS)
    prompt: str = flag("TEXT", text, "text before the answer (default: {question})", default=PLACE, group=QUESTIONS)
    keep_ratios: tuple[float, ...] = flag(
        "R,R,...", comma_separated(SHARE), "default: 1,0.5,0.35,0.25,0.1", default=(), group=ROBUSTNESS
    )
    image_sizes: tuple[int, ...] = flag(
        "PX,PX,...", comma_separated(whole(1)), "resolutions of image-sizes", default=(), group=ROBUSTNESS
    )


def options_of(flags: str, what: str) -> EvalOptions:
    """From a text of `ov2 eval`'s flags, as `ov2 train --eval` has it. Raises UserError that begins with `what`."""
    parser = Parser(prog="ov2 eval", add_help=False)
    add_flags(parser, EvalOptions)
    try:
        given = vars(parser.parse_args(shlex.split(flags)))
    except (UserError, ValueError) as error:  # ValueError: a quote that is not closed
        raise UserError(f"{what} {flags!r}: {error}") from None
    return read_options(EvalOptions, f"{what} {flags!r}", given)


def read_options(kind: type[Options], what: str, given: Mapping[str, Any]) -> Options:
    """Checked values of flags by name; None is as good as not given. Raises UserError that begins with `what`."""
    return from_table(kind, what, {name: value for name, value in given.items() if value is not None})


def source_of(data: str, captions: tuple[CaptionSet, ...] = ()) -> Source:
    """A folder of classes, or tars with captions beside them. Raises UserError."""
    if os.path.isdir(data):  # which no name is too long for
        if captions:
            raise UserError(f"--captions {captions[0]}: captions stand beside tars, and {data} is a folder of images")
        return ImageFolderSource(Path(data))
    return WebDatasetSource(expand_shards(data)[0], captions=captions)


def check_files(options: EvalOptions) -> None:
    """Raises UserError for data or questions that do not exist."""
    source_of(options.data, options.captions)
    if options.train_data:
        source_of(options.train_data)
    if options.questions and not options.questions.is_file():
        raise UserError(f"--questions {options.questions}: no such file")
