"""Questions asked in batches. Oracle: a model that says what it was given, real picture files, scores by hand."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from open_clip_ov2.data.skips import Skipped
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.answering import answer_questions
from open_clip_ov2.evaluate.text.questions import QuestionFile, read_questions

BAD = 4  # the picture of this index does not decode


@pytest.fixture
def file(tmp_path: Path) -> QuestionFile:
    """Ten questions: picture i is of grey level 10 i, the true answer "i"; a line before them is no JSON."""
    lines = ["{"]
    for index in range(10):
        Image.new("RGB", (4, 4), (10 * index,) * 3).save(tmp_path / f"{index}.png")
        rule = ("exact", "relaxed", "ocrbench", "ocrbench-math")[index % 4]
        entry = {"image": f"{index}.png", "question": f"{index}?", "answer": str(index), "rule": rule}
        lines.append(json.dumps({**entry, "id": f"q{index}", "group": "even" if index % 2 == 0 else ""}))
    (tmp_path / f"{BAD}.png").write_bytes(b"no picture")
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    return read_questions(tmp_path / "questions.jsonl")


class Reader:
    """Says the grey level in tens, but for two wrong answers; checks that keys and prompts are the picture's."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, images_BCHW: Tensor, keys: Sequence[str], prompts: Sequence[str]) -> list[str]:
        levels = [round(25.5 * level) for level in images_BCHW.mean((1, 2, 3)).tolist()]
        assert list(keys) == [f"q{level}" for level in levels]
        assert list(prompts) == [f"Q: {level}? {{}} A:" for level in levels]
        self.sizes.append(len(keys))
        return ["wrong" if level in (0, 3) else f"{level}" for level in levels]


def ask(file: QuestionFile, reader: Reader, **options: Any) -> dict[str, Any]:
    return answer_questions(file, reader, to_tensor, prompt="Q: {question} {} A:", **options)


def mean(score: float, questions: int) -> dict[str, Any]:
    return {"score": score, "questions": questions}


def test_scores(file: QuestionFile) -> None:
    """By hand: of 0 1 2 3 5 6 7 8 9, 0 (exact) and 3 (ocrbench-math) are wrong; the rules of OCRBench are one."""
    scores = ask(file, Reader(), batch_size=4)
    assert (scores["score"], scores["questions"]) == (7 / 9, 9)
    assert scores["by_rule"] == {"exact": mean(0.5, 2), "ocrbench": mean(3 / 4, 4), "relaxed": mean(1.0, 3)}
    assert scores["by_group"] == {"even": mean(3 / 4, 4)}
    assert [(one["key"], one["cause"]) for one in scores["skipped"]] == [
        ("questions.jsonl:1", "bad JSON"),
        ("q4", "undecodable image"),
    ]
    assert json.loads(json.dumps(scores)) == scores


@pytest.mark.parametrize("batch_size", [1, 2, 3, 9, 64])
def test_batch_size_changes_nothing(file: QuestionFile, batch_size: int) -> None:
    """Property; batches are full but for the last, whatever was skipped."""
    reader = Reader()
    assert ask(file, reader, batch_size=batch_size) == ask(file, Reader())
    assert sum(reader.sizes) == 9
    assert set(reader.sizes[:-1]) <= {batch_size}


def _rank(rank: int, store: str, file: QuestionFile, results: Any) -> None:
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results.put(ask(file, Reader(), batch_size=2))
    torch.distributed.destroy_process_group()


def test_two_processes_get_what_one_gets(file: QuestionFile, tmp_path: Path) -> None:
    """Oracle: one process. Both of two real ones, forked because importing costs more than all of this, have all."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path / "store"), file, results)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    both = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert both == [ask(file, Reader())] * 2


def test_a_transform_that_fails_costs_one_question(file: QuestionFile) -> None:
    """Property: the others are scored as before."""

    def transform(image: Any) -> Tensor:
        tensor = to_tensor(image)
        if round(25.5 * float(tensor.mean())) == 7:
            raise RuntimeError("seven")
        return tensor

    scores = answer_questions(file, Reader(), transform, prompt="Q: {question} {} A:")
    assert [str(Skipped(**one)) for one in scores["skipped"][1:]] == [
        f"q4: undecodable image ({file.questions[BAD].image})",
        "q7: transform failed (RuntimeError: seven)",
    ]
    assert (scores["score"], scores["questions"]) == (6 / 8, 8)


def test_a_question_too_long_costs_one_question(file: QuestionFile) -> None:
    """Property: the others are scored as before. Room of one token is none: the end of the text needs it."""
    scores = ask(file, Reader(), room=lambda prompt: {"Q: 7? {} A:": 1, "Q: 9? {} A:": 2}.get(prompt, 9))
    assert [str(Skipped(**one)) for one in scores["skipped"][1:]] == [
        f"q4: undecodable image ({file.questions[BAD].image})",
        "q7: question too long (it leaves no room for an answer)",
    ]
    assert (scores["score"], scores["questions"]) == (6 / 8, 8)


def test_slips(file: QuestionFile) -> None:
    with pytest.raises(UserError, match=r"prompt 'Answer:' has no \{question\}"):
        answer_questions(file, Reader(), to_tensor, prompt="Answer:")
    bad = QuestionFile((file.questions[BAD],), file.skipped)
    with pytest.raises(UserError, match=r"no question could be asked \(1 bad JSON, 1 undecodable image"):
        ask(bad, Reader())
