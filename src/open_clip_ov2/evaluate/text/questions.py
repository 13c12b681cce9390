"""Questions about images, from our JSON lines (docs/evaluation.md) or the files that benchmarks publish:

TextVQA, DocVQA  {"data": [{"question", "answers", "image_id" or "image", "question_id", ...}]}
ChartQA          [{"imgname", "query", "label"}]
OCRBench         [{"dataset_name", "type", "image_path", "question", "answers"}]
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from open_clip_ov2.data.skips import BAD_JSON, BAD_UTF8, MISSING_IMAGE, Skipped, SkipSample, summary
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.text.question_answering import RULES, VQA_ANSWERS
from open_clip_ov2.files import read_json

MISSING_QUESTION = "missing question"
MISSING_ANSWERS = "missing answers"
WRONG_NUMBER_OF_ANSWERS = "wrong number of answers"
UNKNOWN_RULE = "unknown rule"
MISSING_OCR_TOKENS = "missing OCR tokens"
OCR_FILES = "TextVQA_Rosetta_OCR_*.json"  # beside TextVQA's own questions, as it publishes them


class Question(NamedTuple):
    """One question, whose image exists. `group` is what a benchmark reports its scores by, or empty."""

    key: str
    image: Path
    question: str
    answers: tuple[str, ...]
    rule: str
    group: str = ""


class QuestionFile(NamedTuple):
    """The usable questions of a file in file order, and the skipped ones."""

    questions: tuple[Question, ...]
    skipped: tuple[Skipped, ...]


def read_questions(
    path: Path, images: Path | None = None, rule: str = "exact", *, ocr_tokens: bool = False
) -> QuestionFile:
    """The questions of a file; `rule` is for those that neither name one nor come from a known benchmark. A bad line is
    skipped under its id, or its file's name and its line number. With `ocr_tokens`, a question ends with what an OCR
    system read in its image: its own `ocr_tokens`, or those of the benchmark's OCR_FILES. Raises UserError."""
    folder = path.parent if images is None else images
    questions: list[Question] = []
    skipped: list[Skipped] = []
    published = _published_ocr_tokens(path.parent) if ocr_tokens else {}
    for number, entry in _entries(path):
        key = f"{path.name}:{number}"
        try:
            entry = _parsed(entry) if isinstance(entry, bytes) else entry
            if not isinstance(entry, dict):
                raise SkipSample(BAD_JSON, "not an object")
            ids = (entry.get(name) for name in ("id", "question_id", "questionId"))
            key = next((str(one) for one in ids if isinstance(one, (str, int)) and one != ""), key)
            question = _question(key, entry, rule, folder)
            if ocr_tokens:
                question = question._replace(question=with_ocr_tokens(question.question, _ocr_tokens(entry, published)))
            questions.append(question)
        except SkipSample as skip:
            skipped.append(Skipped(key, skip.cause, skip.detail))
    if not questions:
        raise UserError(
            f"{path}: no usable question ({summary(skipped) or 'it is empty'}); images are looked for in {folder}"
        )
    return QuestionFile(tuple(questions), tuple(skipped))


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Entries numbered from one; those of JSON lines not parsed yet. Blank lines count, but hold nothing."""
    if path.suffix.lower() == ".json":
        parsed = read_json(path, what='a list of questions or {"data": [...]} (a .jsonl file has one object a line)')
        entries = parsed.get("data") if isinstance(parsed, dict) else parsed
        if not isinstance(entries, list):
            raise UserError(f'{path}: expected a list of questions or {{"data": [...]}}')
        return enumerate(entries, start=1)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot read the questions ({error.strerror})") from None
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise SkipSample(BAD_UTF8, error.reason) from None
    except (ValueError, RecursionError) as error:
        raise SkipSample(BAD_JSON, str(error)) from None


def _question(key: str, entry: Mapping[str, Any], rule: str, folder: Path) -> Question:
    """The entry, checked. Raises SkipSample."""
    places, changed = _benchmark(entry) or ((entry.get("image"),), {})
    found = {"rule": rule, "group": "", "answers": entry.get("answer"), **entry, **changed}
    question, rule = found.get("question"), found["rule"]
    if not isinstance(question, str) or not question.strip():
        raise SkipSample(MISSING_QUESTION)
    if not isinstance(rule, str) or rule not in RULES:
        raise SkipSample(UNKNOWN_RULE, f"{rule!r}; known: {', '.join(RULES)}")
    answers = _answers(found["answers"], rule)
    return Question(key, _image(places, folder), question, answers, rule, str(found["group"]))


def _published_ocr_tokens(folder: Path) -> dict[str, Any]:
    """Tokens by the image's id. Raises UserError."""
    files = [read_json(file, dict).get("data") or () for file in sorted(folder.glob(OCR_FILES))]
    return {str(row.get("image_id")): row.get("ocr_tokens") for rows in files for row in rows if isinstance(row, dict)}


def _ocr_tokens(entry: Mapping[str, Any], published: Mapping[str, Any]) -> list[Any]:
    tokens = entry.get("ocr_tokens", published.get(str(entry.get("image_id"))))
    if not isinstance(tokens, list):
        raise SkipSample(MISSING_OCR_TOKENS, f"neither in the question nor in {OCR_FILES} beside the file")
    return tokens


def with_ocr_tokens(question: str, tokens: Sequence[Any]) -> str:
    """As LLaVA and lmms-eval ask TextVQA."""
    return f"{question}\nReference OCR token: {', '.join(map(str, tokens))}"


def _benchmark(entry: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Where the image of a benchmark's entry may be, and what its fields are to us; None for an entry of our own."""
    if "rule" in entry or ("image" in entry and "questionId" not in entry):
        return None
    if "imgname" in entry:  # ChartQA
        name = entry["imgname"]
        return (f"png/{name}", name), {"question": entry.get("query"), "answers": entry.get("label"), "rule": "relaxed"}
    if "image_path" in entry:  # OCRBench
        name = entry["image_path"]
        rule = "ocrbench-math" if entry.get("dataset_name") == "HME100k" else "ocrbench"
        return (name, f"OCRBench_Images/{name}"), {"rule": rule, "group": entry.get("type", "")}
    if "questionId" in entry:  # DocVQA: its images lie in a flat folder today, whatever `image` says
        name = str(entry.get("image", "")).rsplit("/", 1)[-1]
        flat = (name, f"spdocvqa_images/{name}") if name else ()
        return (entry.get("image"), *flat), {"rule": "anls"}
    if "image_id" in entry:  # TextVQA 0.5.1: the images of its validation split are in train_images
        name = f"{entry['image_id']}.jpg"
        return (name, f"train_images/{name}", f"test_images/{name}"), {"rule": "vqa"}
    return None


def _answers(given: Any, rule: str) -> tuple[str, ...]:
    """Answers as texts. An empty one is contained in everything, so only vqa, which counts people, keeps it."""
    listed = given if isinstance(given, list) else [given]
    if any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in listed):
        raise SkipSample(MISSING_ANSWERS)
    texts = tuple(str(one) for one in listed)
    real = tuple(text for text in texts if text.strip())
    if not real:
        raise SkipSample(MISSING_ANSWERS)
    if rule == "vqa" and len(texts) != VQA_ANSWERS:
        raise SkipSample(WRONG_NUMBER_OF_ANSWERS, f"rule vqa takes {VQA_ANSWERS}, one a person, and got {len(texts)}")
    return texts if rule == "vqa" else real


def _image(places: Sequence[Any], folder: Path) -> Path:
    names = [name for name in places if isinstance(name, str) and name and "\0" not in name]
    for name in names:
        if not Path(os.path.abspath(folder / name)).is_relative_to(os.path.abspath(folder)):
            raise SkipSample(MISSING_IMAGE, f"{name} is outside {folder} (--question-images)")
    try:
        found = next((folder / name for name in names if (folder / name).is_file()), None)
    except (OSError, ValueError):  # a name that is too long, or no text that a file system takes
        found = None
    if found is None:
        raise SkipSample(MISSING_IMAGE, " or ".join(names) or "no image is named")
    return found
