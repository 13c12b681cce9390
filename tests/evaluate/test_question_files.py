"""Question files. Oracle: small files in the shapes that the benchmarks publish, and what they mean, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.text.questions import Question, read_questions


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_text_vqa(tmp_path: Path) -> None:
    touch(tmp_path / "train_images/0054c91397f2fe05.jpg")
    entry = {
        "question": "what is the brand?",
        "image_id": "0054c91397f2fe05",
        "image_classes": ["Camera"],
        "flickr_300k_url": "https://c1.staticflickr.com/x.jpg",
        "question_tokens": ["what"],
        "question_id": 34602,
        "set_name": "val",
        "answers": ["nous les gosses", "", *["dakota"] * 8],
    }
    path = write_json(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [entry]})
    (question,) = read_questions(path).questions
    image = tmp_path / "train_images/0054c91397f2fe05.jpg"
    answers = ("nous les gosses", "", *["dakota"] * 8)
    assert question == Question("34602", image, "what is the brand?", answers, "vqa")


def test_chart_qa(tmp_path: Path) -> None:
    touch(tmp_path / "png/41699051005347.png")
    entries = [{"imgname": "41699051005347.png", "query": "How many food items?", "label": "14"}]
    (question,) = read_questions(write_json(tmp_path / "test_human.json", entries)).questions
    image = tmp_path / "png/41699051005347.png"
    assert question == Question("test_human.json:1", image, "How many food items?", ("14",), "relaxed")


def test_ocr_bench(tmp_path: Path) -> None:
    """The images stand in a folder of their own; formulas of HME100k have a rule of their own."""
    images = tmp_path / "elsewhere"
    touch(images / "IIIT5K/1.png", images / "OCRBench_Images/HME100k/2.jpg")
    kinds = ("Regular Text Recognition", "Handwritten Mathematical Expression Recognition")
    entries = [
        {"dataset_name": "IIIT5K", "id": 0, "type": kinds[0], "image_path": "IIIT5K/1.png"},
        {"dataset_name": "HME100k", "id": 1, "type": kinds[1], "image_path": "HME100k/2.jpg"},
    ]
    entries[0] |= {"question": "what is written in the image?", "answers": ["CENTRE"]}
    entries[1] |= {"question": "Please write out the expression.", "answers": r"\frac { 1 } { 2 }"}
    first, second = read_questions(write_json(tmp_path / "OCRBench.json", entries), images).questions
    assert first == Question(
        "0", images / "IIIT5K/1.png", "what is written in the image?", ("CENTRE",), "ocrbench", kinds[0]
    )
    assert (second.key, second.rule, second.group) == ("1", "ocrbench-math", kinds[1])
    assert second.image == images / "OCRBench_Images/HME100k/2.jpg"


def test_doc_vqa(tmp_path: Path) -> None:
    touch(tmp_path / "documents/xnbl0037_1.png")
    entry = {"questionId": 337, "question": "what is the date?", "docId": 279, "image": "documents/xnbl0037_1.png"}
    path = write_json(tmp_path / "val_v1.0.json", {"data": [{**entry, "answers": ["1/8/93", "1/8/1993"]}]})
    (question,) = read_questions(path).questions
    image = tmp_path / "documents/xnbl0037_1.png"
    assert question == Question("337", image, "what is the date?", ("1/8/93", "1/8/1993"), "anls")


@pytest.mark.parametrize("place", ["xnbl0037_1.png", "spdocvqa_images/xnbl0037_1.png"])
def test_doc_vqa_in_a_flat_folder(place: str, tmp_path: Path) -> None:
    """As the pictures are handed out today."""
    touch(tmp_path / place)
    entry = {"questionId": 337, "question": "when?", "docId": 279, "image": "documents/xnbl0037_1.png"}
    path = write_json(tmp_path / "val_v1.0.json", {"data": [{**entry, "answers": ["1/8/93"]}]})
    (question,) = read_questions(path).questions
    assert question.image == tmp_path / place


def test_own_lines(tmp_path: Path) -> None:
    touch(tmp_path / "a.png", tmp_path / "deep/b.png")
    lines = [
        {"image": "a.png", "question": "How many?", "answer": 3},
        {
            "image": str(tmp_path / "deep/b.png"),
            "question": "Which?",
            "answers": ["x", "y", ""],
            "id": "q",
            "rule": "anls",
        },
        {"image": "a.png", "question": "Who?", "answer": "z", "image_id": "kept by the user", "group": "people"},
    ]
    lines[1] |= {"id": "q", "rule": "anls"}
    path = tmp_path / "own.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert read_questions(path, rule="relaxed").questions == (
        Question("own.jsonl:1", tmp_path / "a.png", "How many?", ("3",), "relaxed"),
        Question("q", tmp_path / "deep/b.png", "Which?", ("x", "y"), "anls"),
        Question("own.jsonl:5", tmp_path / "a.png", "Who?", ("z",), "relaxed", "people"),
    )


GOOD = {"image": "a.png", "question": "q", "answer": "x"}
BAD: dict[bytes, tuple[str, str]] = {
    b'{"image": ': ("own.jsonl:2", "bad JSON"),
    b"[" * 20_000: ("own.jsonl:2", "bad JSON"),
    b'"text"': ("own.jsonl:2", "bad JSON"),
    b'{"question": "\xff"}': ("own.jsonl:2", "bad UTF-8"),
    b'{"image": "a.png", "question": "q", "id": "k"}': ("k", "missing answers"),
    b'{"image": "a.png", "question": "q", "answers": [], "id": 7}': ("7", "missing answers"),
    b'{"image": "a.png", "question": "q", "answers": [" "]}': ("own.jsonl:2", "missing answers"),
    b'{"image": "a.png", "question": "q", "answers": [{"text": "x"}]}': ("own.jsonl:2", "missing answers"),
    b'{"image": "a.png", "question": " ", "answer": "x"}': ("own.jsonl:2", "missing question"),
    b'{"image": "gone.png", "question": "q", "answer": "x"}': ("own.jsonl:2", "missing image"),
    b'{"image": "../own/0.png", "question": "q", "answer": "x"}': ("own.jsonl:2", "missing image"),
    b'{"image": "/etc/passwd", "question": "q", "answer": "x"}': ("own.jsonl:2", "missing image"),
    rb'{"image": "\ud800", "question": "q", "answer": "x"}': ("own.jsonl:2", "missing image"),
    b'{"image": "", "question": "q", "answer": "x"}': ("own.jsonl:2", "missing image"),
    b'{"image": "%s", "question": "q", "answer": "x"}' % (b"a" * 5000): ("own.jsonl:2", "missing image"),
    b'{"image": "a.png", "question": "q", "answer": "x", "rule": "vga"}': ("own.jsonl:2", "unknown rule"),
    b'{"image": "a.png", "question": "q", "answer": "x", "rule": ["vqa"]}': ("own.jsonl:2", "unknown rule"),
    b'{"image": "a.png", "question": "q", "answer": "x", "rule": "vqa"}': ("own.jsonl:2", "wrong number of answers"),
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:60].decode(errors="replace"))
def test_a_bad_line_is_reported_and_the_others_are_read(line: bytes, tmp_path: Path) -> None:
    touch(tmp_path / "a.png")
    path = tmp_path / "own.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n" + json.dumps(GOOD).encode())
    file = read_questions(path)
    assert [one.key for one in file.questions] == ["own.jsonl:1", "own.jsonl:3"]
    assert [(one.key, one.cause) for one in file.skipped] == [BAD[line]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.jsonl", "{}\n[]\n{", r"q.jsonl: no usable question \(2 bad JSON, 1 missing question; the first: q.jsonl:1"),
        ("q.jsonl", "\n", "it is empty"),
        ("q.json", "{}\n{}", "q.json: not JSON .* .jsonl file has one object a line"),
        ("q.json", '{"questions": []}', "expected a list of questions"),
        ("q.json", '{"data": []}', "it is empty"),
    ],
)
def test_a_file_without_a_usable_question(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_questions(path)


def test_slips(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the questions"):
        read_questions(tmp_path / "gone.jsonl")
