"""Questions about images, from our JSON lines or the files that benchmarks publish.

    *.jsonl   a line each: {"image": path, "question": str, "answer" or "answers": text or list, "id", "rule", "group"}
    *.json    TextVQA, DocVQA  {"data": [{"question", "answers", "image_id" or "image", "question_id", ...}]}
              ChartQA          [{"imgname", "query", "label"}]
              OCRBench         [{"dataset_name", "type", "image_path", "question", "answers"}]
              a list of objects like our lines

Images are looked for beside the file, or in the folder that is given, and in the subfolders that a benchmark ships.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from open_clip_ov2.data.skips import BAD_JSON, BAD_UTF8, MISSING_IMAGE, Skipped, summary
from open_clip_ov2.errors import UserError, unknown_key
from open_clip_ov2.evaluate.text.question_answering import RULES, VQA_ANSWERS
from open_clip_ov2.files import read_json

MISSING_QUESTION = "missing question"
MISSING_ANSWERS = "missing answers"
WRONG_NUMBER_OF_ANSWERS = "wrong number of answers"
UNKNOWN_RULE = "unknown rule"


@dataclass(frozen=True)
class Question:
    """One question, whose image exists. `group` is what a benchmark reports its scores by, or empty."""

    key: str
    image: Path
    question: str
    answers: tuple[str, ...]
    rule: str
    group: str = ""


@dataclass(frozen=True)
class QuestionFile:
    """The usable questions of a file in file order, and the skipped ones."""

    questions: tuple[Question, ...]
    skipped: tuple[Skipped, ...]


class _Unusable(Exception):
    """Cause and detail."""


def read_questions(path: Path, images: Path | None = None, rule: str = "exact") -> QuestionFile:
    """The questions of a file; `rule` is for those that neither name one nor come from a known benchmark.

    A bad line is skipped under its id, or under the file's name and its line number.
    Raises UserError if the file cannot be read or has no usable question, or the rule is unknown.
    """
    if rule not in RULES:
        raise unknown_key(str(path), rule, RULES, "rule")
    folder = path.parent if images is None else images
    questions: list[Question] = []
    skipped: list[Skipped] = []
    for number, entry in _entries(path):
        key = f"{path.name}:{number}"
        try:
            if isinstance(entry, _Unusable):
                raise entry
            if not isinstance(entry, dict):
                raise _Unusable(BAD_JSON, "not an object")
            ids = (entry.get(name) for name in ("id", "question_id", "questionId"))
            key = next((str(one) for one in ids if isinstance(one, (str, int)) and one != ""), key)
            questions.append(_question(key, _fields(entry, rule), folder))
        except _Unusable as unusable:
            skipped.append(Skipped(key, *unusable.args))
    if not questions:
        raise UserError(
            f"{path}: no usable question ({summary(skipped) or 'it is empty'}); images are looked for in {folder}"
        )
    return QuestionFile(tuple(questions), tuple(skipped))


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Entries numbered from one, each parsed or the error of its line. Blank lines count, but hold nothing."""
    if path.suffix.lower() == ".json":
        parsed = read_json(path, what='a list of questions or {"data": [...]} (a .jsonl file has one object a line)')
        entries = parsed.get("data") if isinstance(parsed, dict) else parsed
        if not isinstance(entries, list):
            raise UserError(f'{path}: expected a list of questions or {{"data": [...]}}')
        yield from enumerate(entries, start=1)
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the questions ({error.strerror})") from None
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except UnicodeDecodeError as error:
            yield number, _Unusable(BAD_UTF8, error.reason)
        except (ValueError, RecursionError) as error:
            yield number, _Unusable(BAD_JSON, str(error))


class _Fields(NamedTuple):
    """An entry of any benchmark, not checked yet; `images` are the places where its image may be."""

    images: tuple[Any, ...]
    question: Any
    answers: Any
    rule: Any
    group: str = ""


def _fields(entry: Mapping[str, Any], rule: str) -> _Fields:
    """A benchmark is known by the field that only its entries have."""
    question, answers = entry.get("question"), entry.get("answers")
    own = "rule" in entry or ("image" in entry and "questionId" not in entry)
    if not own and "imgname" in entry:  # ChartQA
        name = entry["imgname"]
        return _Fields((f"png/{name}", name), entry.get("query"), entry.get("label"), "relaxed")
    if not own and "image_path" in entry:  # OCRBench
        name = entry["image_path"]
        rule = "ocrbench-math" if entry.get("dataset_name") == "HME100k" else "ocrbench"
        return _Fields((name, f"OCRBench_Images/{name}"), question, answers, rule, str(entry.get("type", "")))
    if not own and "questionId" in entry:  # DocVQA: its images lie in a flat folder today, whatever `image` says
        name = str(entry.get("image", "")).rsplit("/", 1)[-1]
        flat = (name, f"spdocvqa_images/{name}") if name else ()
        return _Fields((entry.get("image"), *flat), question, answers, "anls")
    if not own and "image_id" in entry:  # TextVQA 0.5.1: the images of its validation split are in train_images
        name = f"{entry['image_id']}.jpg"
        return _Fields((name, f"train_images/{name}", f"test_images/{name}"), question, answers, "vqa")
    answers = entry.get("answers", entry.get("answer"))
    return _Fields((entry.get("image"),), question, answers, entry.get("rule", rule), str(entry.get("group", "")))


def _question(key: str, fields: _Fields, folder: Path) -> Question:
    """The entry, checked. Raises _Unusable."""
    if not isinstance(fields.question, str) or not fields.question.strip():
        raise _Unusable(MISSING_QUESTION)
    if not isinstance(fields.rule, str) or fields.rule not in RULES:
        raise _Unusable(UNKNOWN_RULE, f"{fields.rule!r}; known: {', '.join(RULES)}")
    answers = _answers(fields.answers, fields.rule)
    return Question(key, _image(fields.images, folder), fields.question, answers, fields.rule, fields.group)


def _answers(given: Any, rule: str) -> tuple[str, ...]:
    """Answers as texts. An empty one is contained in everything, so only vqa, which counts people, keeps it."""
    listed = given if isinstance(given, list) else [given]
    if any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in listed):
        raise _Unusable(MISSING_ANSWERS)
    texts = tuple(str(one) for one in listed)
    real = tuple(text for text in texts if text.strip())
    if not real:
        raise _Unusable(MISSING_ANSWERS)
    if rule == "vqa" and len(texts) != VQA_ANSWERS:
        raise _Unusable(WRONG_NUMBER_OF_ANSWERS, f"rule vqa takes {VQA_ANSWERS}, one a person, and got {len(texts)}")
    return texts if rule == "vqa" else real


def _image(places: Sequence[Any], folder: Path) -> Path:
    names = [name for name in places if isinstance(name, str) and name and "\0" not in name]
    try:
        found = next((folder / name for name in names if (folder / name).is_file()), None)
    except (OSError, ValueError):  # a name that is too long, or no text that a file system takes
        found = None
    if found is None:
        raise _Unusable(MISSING_IMAGE, " or ".join(names) or "no image is named")
    return found
