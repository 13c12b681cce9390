"""What an evaluation is asked for: the flags of `ov2 eval` and `ov2 caption`, each declared once.

The same names are the keyword arguments of `open_clip_ov2.evaluate`, and stand in the text of `ov2 train --eval`.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from open_clip_ov2.core.generate import GENERATION_TYPES
from open_clip_ov2.data.captions import CaptionKey, parse_caption_keys
from open_clip_ov2.data.shards import WebDatasetSource, check_shards_exist, expand_shards
from open_clip_ov2.data.sources import ImageFolderSource, Source
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.answering import PLACE
from open_clip_ov2.evaluate.classes import TEMPLATES, Classes
from open_clip_ov2.evaluate.text.question_answering import RULES
from open_clip_ov2.files import read_json
from open_clip_ov2.tables import Reader, each, from_table, kebab, one_of, real, switch, text, whole

Options = TypeVar("Options")
ALL = "all"


def flag(read: Reader, help: str, default: Any = None, metavar: str | None = None, group: str = "") -> Any:
    """A field that is a flag, a keyword argument and a key: its reader, its help text, and where `--help` shows it."""
    metadata = {"read": read, "name": None, "example": "", "help": help, "metavar": metavar, "group": group}
    return field(default=default, metadata=metadata)


def _list(read: Reader) -> Reader:
    """Values separated by commas, or a list of them."""
    return lambda value: each(read)([part.strip() for part in value.split(",")] if isinstance(value, str) else value)


def _path(value: Any) -> Path:
    return Path(text(os.fspath(value) if isinstance(value, os.PathLike) else value))


def _folder(value: Any) -> Path:
    """A folder that can be written to, or can be made."""
    folder = _path(value)
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{folder}: not a folder that can be written to")
    return folder


def _key(value: Any) -> CaptionKey:
    """The one place of a label or group."""
    keys = _caption_keys(value)
    if len(keys) > 1:
        raise UserError(f"{value!r} names {len(keys)} places; expected one")
    return keys[0]


def _caption_keys(value: Any) -> tuple[CaptionKey, ...]:
    try:
        return parse_caption_keys(text(value))
    except UserError as error:
        raise UserError(str(error).removeprefix("--caption-keys: ")) from None


def _guess(value: Any) -> dict[str, float]:
    table = value if isinstance(value, Mapping) else read_json(_path(value), dict, "an object of numbers in (0, 1]")
    return {str(kind): real(0, 1, above=True)(chance) for kind, chance in table.items()}


def _templates(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, (list, tuple)) else read_json(_path(value), list, "a list of texts")
    wrong = [one for one in texts if not isinstance(one, str) or "{}" not in one]
    if wrong or not texts:
        raise UserError(f"expected a list of texts with {{}} where the class goes, got {(wrong or [texts])[0]!r}")
    return tuple(texts)


def _classes(value: Any) -> Classes:
    return Classes.of(value) if isinstance(value, (list, tuple, dict)) else Classes.read(_path(value))


def _tasks(value: Any) -> tuple[str, ...]:
    return () if value == ALL else _list(text)(value)


SHARE = real(0, 1, above=True)
GENERATION, PROBES, QUESTIONS, ROBUSTNESS = "generation", "classes and probes", "questions", "robustness"


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How captions are generated; `seq_len` counts tokens."""

    keep_ratio: float | None = flag(SHARE, "share of image tokens kept (default: the model's in evaluation)", None, "R")
    generation_type: str = flag(one_of(*GENERATION_TYPES), "how tokens are chosen", "greedy", group=GENERATION)
    num_beams: int = flag(whole(1), "beams of beam_search", 4, "N", GENERATION)
    top_k: int = flag(whole(1), "tokens that top_k chooses among", 50, "N", GENERATION)
    top_p: float = flag(SHARE, "probability that top_p chooses among", 0.9, "P", GENERATION)
    temperature: float = flag(real(0, above=True), "for top_k and top_p", 1.0, "T", GENERATION)
    seq_len: int | None = flag(
        whole(2), "longest caption in tokens (default: the context length)", None, "N", GENERATION
    )

    @property
    def generation(self) -> dict[str, Any]:
        """Options of CaptionModel.generate."""
        return {name: getattr(self, name) for name in _GENERATE}


_GENERATE = ("generation_type", "num_beams", "top_k", "top_p", "temperature", "seq_len")


@dataclass(frozen=True, kw_only=True)
class EvalOptions(GenerationOptions):
    """`guess`: the chance of a right guess by kind of image. No `tasks` means all that can be done."""

    data: str = flag(text, "tars, as for ov2 train --val-data, or a folder CLASS/image.jpg", MISSING, "DATA")
    tasks: tuple[str, ...] = flag(_tasks, "what to evaluate (default: all that model and data allow)", (), "A,B,...")
    caption_keys: tuple[CaptionKey, ...] = flag(_caption_keys, "default: txt", (CaptionKey("txt"),), "KEYS")
    label_key: CaptionKey | None = flag(_key, "class of an image: cls, json:label", None, "ENTRY[:FIELD]")
    group_by: CaptionKey | None = flag(_key, "report by the value of this, json:kind", None, "ENTRY[:FIELD]")
    guess: Mapping[str, float] | None = flag(_guess, "chance of a right guess by group", None, "FILE.json")
    batch_size: int = flag(whole(1), "images at a time", 64, "N")
    workers: int = flag(whole(0), "data workers", 0, "N")
    train_data: str | None = flag(text, "labelled data for linear-probe, knn, attentive-probe", None, "DATA", PROBES)
    cache: Path | None = flag(_folder, "keep features in this folder, and read them from it", None, "FOLDER", PROBES)
    feature_disk: Path | None = flag(
        _folder, "memory-map features in this folder instead of RAM", None, "FOLDER", PROBES
    )
    classes: Classes | None = flag(
        _classes, "[names] or {label: name} (default: the labels of --data)", None, "FILE.json", PROBES
    )
    templates: tuple[str, ...] = flag(_templates, 'texts (default: "a photo of a {}.")', TEMPLATES, "FILE.json", PROBES)
    length_normalise: bool = flag(switch, "likelihood per token, not per caption", False, group=PROBES)
    questions: Path | None = flag(
        _path, "JSON lines, or a file of TextVQA, ChartQA, OCRBench or DocVQA", None, "FILE", QUESTIONS
    )
    question_images: Path | None = flag(_path, "default: the folder of FILE", None, "FOLDER", QUESTIONS)
    question_rule: str = flag(one_of(*RULES), "rule where FILE names none", "exact", group=QUESTIONS)
    prompt: str = flag(text, "text before the answer", PLACE, "TEXT", QUESTIONS)
    keep_ratios: tuple[float, ...] = flag(_list(SHARE), "default: 1,0.5,0.35,0.25,0.1", (), "R,R,...", ROBUSTNESS)
    image_sizes: tuple[int, ...] = flag(_list(whole(1)), "resolutions of image-sizes", (), "PX,PX,...", ROBUSTNESS)


def add_flags(parser: argparse.ArgumentParser, kind: type, leave_out: Sequence[str] = ()) -> None:
    """The fields of EvalOptions or GenerationOptions as flags; what is not given is not in the namespace."""
    groups: dict[str, Any] = {"": parser}
    for one in fields(kind):
        about, name = one.metadata, f"--{kebab(one.name)}"
        group = groups.setdefault(about["group"], None) or parser.add_argument_group(about["group"])
        groups[about["group"]] = group
        shown = one.default not in (None, (), False, MISSING) and "default" not in about["help"]
        help_text = (about["help"] + (f" (default: {one.default})" if shown else "")).replace("%", "%%")
        more: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_text, "required": one.default is MISSING}
        if one.default is False:
            group.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=help_text)
        else:
            group.add_argument(name, metavar=about["metavar"] or "NAME", **more)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{self.prog}: {message} (`ov2 eval --help` lists the flags)")


def options_of(flags: str, what: str) -> EvalOptions:
    """From a text of `ov2 eval`'s flags, as `ov2 train --eval` has it. Raises UserError that begins with `what`."""
    parser = _Parser(prog=what, add_help=False, allow_abbrev=False)
    add_flags(parser, EvalOptions)
    try:
        argv = shlex.split(flags)
    except ValueError as error:
        raise UserError(f"{what}: {error} in {flags!r}") from None
    return read_options(EvalOptions, what, vars(parser.parse_args(argv)))


def read_options(kind: type[Options], what: str, given: Mapping[str, Any]) -> Options:
    """Checked values of flags by name; None is as good as not given. Raises UserError that begins with `what`."""
    return from_table(kind, what, {name: value for name, value in given.items() if value is not None})


def source_of(data: str) -> Source:
    """A folder of classes, or tars. Raises UserError."""
    if os.path.isdir(data):  # which no name is too long for
        return ImageFolderSource(Path(data))
    urls, _ = expand_shards(data)
    check_shards_exist(urls)
    return WebDatasetSource(urls=urls, weights=None, resampled=False)


def check_files(options: EvalOptions) -> None:
    """Raises UserError for data or questions that do not exist."""
    for data in (options.data, options.train_data):
        if data:
            source_of(data)
    if options.questions and not options.questions.is_file():
        raise UserError(f"--questions {options.questions}: no such file")
