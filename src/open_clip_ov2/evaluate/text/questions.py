"""Questions about pictures, from our JSON lines or the files that benchmarks publish.

    *.jsonl   a line each: {"image": path, "question": str, "answer" or "answers": text or list, "id", "rule", "group"}
    *.json    TextVQA, DocVQA  {"data": [{"question", "answers", "image_id" or "image", "question_id", ...}]}
              ChartQA          [{"imgname", "query", "label"}]
              OCRBench         [{"dataset_name", "type", "image_path", "question", "answers"}]
              a list of objects like our lines

Images are looked for beside the file, or in the folder that is given, and in the subfolders that a benchmark ships.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.data.skips import BAD_JSON, BAD_UTF8, MISSING_IMAGE
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.skipped import Skipped, summary
from open_clip_ov2.evaluate.text.question_answering import RULES, VQA_ANSWERS

MISSING_QUESTION = "missing question"
MISSING_ANSWERS = "missing answers"
WRONG_NUMBER_OF_ANSWERS = "wrong number of answers"
UNKNOWN_RULE = "unknown rule"


@dataclass(frozen=True)
class Question:
    """One question, whose image exists. `group` is what a benchmark breaks its score down by, or empty."""

    key: str
    image: Path
    question: str
    answers: tuple[str, ...]
    rule: str
    group: str = ""


@dataclass(frozen=True)
class QuestionFile:
    """The usable questions of a file in its order, and what was left out."""

    questions: tuple[Question, ...]
    skipped: tuple[Skipped, ...]


class _Unusable(Exception):
    """Cause and detail."""


def read_questions(path: Path, images: Path | None = None, rule: str = "exact") -> QuestionFile:
    """Questions of a file, `rule` for those that neither name one nor come from a known benchmark.

    A bad line is skipped under its id, or under the file's name and its number in it.
    Raises UserError if the file cannot be read or has no usable question, or the rule is unknown.
    """
    if rule not in RULES:
        raise UserError(f"no rule {rule!r} for answers (there are: {', '.join(RULES)})")
    folder = path.parent if images is None else images
    questions: list[Question] = []
    skipped: list[Skipped] = []
    for number, entry in _entries(path):
        key = f"{path.name}:{number}"
        try:
            if isinstance(entry, _Unusable):
                raise entry
            record = _record(entry, rule)
            key = record.key or key
            questions.append(_question(record, key, folder))
        except _Unusable as unusable:
            skipped.append(Skipped(key, *unusable.args))
    if not questions:
        raise UserError(
            f"{path}: no usable question ({summary(skipped) or 'it is empty'}); images are sought in {folder}"
        )
    return QuestionFile(tuple(questions), tuple(skipped))


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Numbers from one and parsed entries, or what is wrong with a line. Blank lines count, but hold nothing."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the questions ({error.strerror})") from None
    if path.suffix.lower() == ".json":
        yield from enumerate(_published(path, content), start=1)
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except UnicodeDecodeError as error:
            yield number, _Unusable(BAD_UTF8, error.reason)
        except (ValueError, RecursionError) as error:
            yield number, _Unusable(BAD_JSON, str(error))


def _published(path: Path, content: bytes) -> list[Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); one object a line is read from a .jsonl file") from None
    entries = parsed.get("data") if isinstance(parsed, dict) else parsed
    if not isinstance(entries, list):
        raise UserError(f'{path}: neither a list of questions nor {{"data": [...]}}')
    return entries


@dataclass(frozen=True)
class _Record:
    """An entry of any shape, not checked yet."""

    key: str
    images: tuple[Any, ...]  # candidates, relative to the folder
    question: Any
    answers: Any
    rule: Any
    group: str


def _record(entry: Any, rule: str) -> _Record:
    if not isinstance(entry, dict):
        raise _Unusable(BAD_JSON, "not an object")
    if "rule" in entry or ("image" in entry and "questionId" not in entry):
        return _own(entry, rule)
    shapes = (shape for mark, shape in _SHAPES.items() if mark in entry)
    return next(shapes, _own)(entry, rule)


def _text_vqa(entry: Mapping[str, Any], rule: str) -> _Record:
    """TextVQA 0.5.1. Pictures of its validation split are in train_images."""
    name = f"{entry['image_id']}.jpg"
    folders = ("train_images", "test_images")
    images = (name, *(f"{folder}/{name}" for folder in folders))
    return _Record(_key(entry), images, entry.get("question"), entry.get("answers"), "vqa", "")


def _doc_vqa(entry: Mapping[str, Any], rule: str) -> _Record:
    """Its pictures lie in a flat folder today, whatever `image` says."""
    name = str(entry.get("image", "")).rsplit("/", 1)[-1]
    images = (entry.get("image"), name, f"spdocvqa_images/{name}") if name else (entry.get("image"),)
    return _Record(_key(entry), images, entry.get("question"), entry.get("answers"), "anls", "")


def _chart_qa(entry: Mapping[str, Any], rule: str) -> _Record:
    name = entry["imgname"]
    return _Record(_key(entry), (f"png/{name}", name), entry.get("query"), entry.get("label"), "relaxed", "")


def _ocr_bench(entry: Mapping[str, Any], rule: str) -> _Record:
    name, question = entry["image_path"], entry.get("question")
    rule = "ocrbench-math" if entry.get("dataset_name") == "HME100k" else "ocrbench"
    images = (name, f"OCRBench_Images/{name}")
    return _Record(_key(entry), images, question, entry.get("answers"), rule, str(entry.get("type", "")))


def _own(entry: Mapping[str, Any], rule: str) -> _Record:
    answers = entry.get("answers", entry.get("answer"))
    named = entry.get("rule", rule)
    group = str(entry.get("group", ""))
    return _Record(_key(entry), (entry.get("image"),), entry.get("question"), answers, named, group)


# The field that only this benchmark's entries have.
_SHAPES: dict[str, Callable[[Mapping[str, Any], str], _Record]] = {
    "imgname": _chart_qa,
    "image_path": _ocr_bench,
    "questionId": _doc_vqa,
    "image_id": _text_vqa,
}


def _key(entry: Mapping[str, Any]) -> str:
    names = ("id", "question_id", "questionId")
    return next((str(entry[name]) for name in names if isinstance(entry.get(name), str | int)), "")


def _question(record: _Record, key: str, folder: Path) -> Question:
    """The record, checked. Raises _Unusable."""
    if not isinstance(record.question, str) or not record.question.strip():
        raise _Unusable(MISSING_QUESTION)
    if not isinstance(record.rule, str) or record.rule not in RULES:
        raise _Unusable(UNKNOWN_RULE, f"{record.rule!r}; there are: {', '.join(RULES)}")
    answers = _answers(record.answers, record.rule)
    return Question(key, _image(record, folder), record.question, answers, record.rule, record.group)


def _answers(given: Any, rule: str) -> tuple[str, ...]:
    """Answers as texts. An empty one is contained in everything, so only vqa, which counts people, keeps it."""
    listed = given if isinstance(given, list) else [given]
    if any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in listed):
        raise _Unusable(MISSING_ANSWERS)
    texts = tuple(str(one) for one in listed)
    real = tuple(text for text in texts if text.strip())
    if not real:
        raise _Unusable(MISSING_ANSWERS)
    if rule != "vqa":
        return real
    if len(texts) != VQA_ANSWERS:
        raise _Unusable(WRONG_NUMBER_OF_ANSWERS, f"rule vqa takes {VQA_ANSWERS}, one a person, and got {len(texts)}")
    return texts


def _image(record: _Record, folder: Path) -> Path:
    names = [name for name in record.images if isinstance(name, str) and name and "\0" not in name]
    try:
        found = next((folder / name for name in names if (folder / name).is_file()), None)
    except (OSError, ValueError):  # a name that is too long, or no text that a file system takes
        found = None
    if found is None:
        raise _Unusable(MISSING_IMAGE, " or ".join(names) or "no image is named")
    return found
