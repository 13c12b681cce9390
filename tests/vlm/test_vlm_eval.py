"""`ov2 vlm eval` and `ov2 vlm compare` on a tiny LLaVA."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from open_clip_ov2.cli import main
from open_clip_ov2.data.decode import bounded
from open_clip_ov2.errors import RunFailed, UserError
from open_clip_ov2.evaluate.answering import answer_questions
from open_clip_ov2.evaluate.text.questions import read_questions
from open_clip_ov2.vlm import assemble
from open_clip_ov2.vlm.benchmarks import lmms, score_table
from open_clip_ov2.vlm.benchmarks.answerer import VlmAnswerer
from open_clip_ov2.vlm.vlm_recipe import load_vlm_recipe


@pytest.fixture(scope="module")
def model(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of the fixture's parts, untrained."""
    folder = tmp_path_factory.mktemp("llava")
    assemble.build(str(parts / "encoder"), str(parts / "lm"), load_vlm_recipe(str(parts / "recipe.toml")), folder, 0)
    return folder


def question_lines(parts: Path) -> str:
    rows = [
        {"id": f"q{index}", "image": f"{index}.png", "question": "what?" + " really?" * index, "group": "g"}
        for index in range(5)
    ]
    return "".join(json.dumps({**row, "answer": "red", "rule": "exact"}) + "\n" for row in rows)


def test_answers_in_a_batch_are_those_of_one_question_at_a_time(parts: Path, model: Path, tmp_path: Path) -> None:
    """Oracle: greedy decoding in plain steps, one question at a time, without a cache or padding."""
    (tmp_path / "q.jsonl").write_text(question_lines(parts))
    file = read_questions(tmp_path / "q.jsonl", parts / "data" / "pictures")
    answerer = VlmAnswerer(model, max_new_tokens=6)
    found = answer_questions(file, answerer, bounded, batch_size=3, prompt="Q: {question}", collate=list)
    stops, expected = answerer.model.generation_config.eos_token_id, {}
    for one in file.questions:
        text = answerer.prompt(f"Q: {one.question}")
        assert text == f"<s>Answer briefly. USER: <image>\nQ: {one.question} ASSISTANT:"
        picture = Image.open(one.image).convert("RGB")
        inputs = dict(answerer.processor(images=picture, text=text, return_tensors="pt", add_special_tokens=False))
        start = inputs["input_ids"].shape[1]
        while inputs["input_ids"].shape[1] < start + 6:
            with torch.no_grad():
                logits = answerer.model(
                    input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], use_cache=False
                ).logits  # fmt: skip
            token = int(logits[0, -1].argmax())
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
            if token in stops:
                break
        ids = inputs["input_ids"][0, start:]
        expected[one.key] = answerer.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert answerer.answers == expected
    assert found["questions"] == 5


def test_scores_are_kept_and_compared(
    parts: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the answers that were written, scored as wrong; the published row as the paper prints it."""
    (tmp_path / "words.jsonl").write_text(question_lines(parts))
    images = str(parts / "data" / "pictures")
    asked = ["--questions", str(tmp_path / "words.jsonl"), "--question-images", images, "--max-new-tokens", "2"]
    assert main(["vlm", "eval", str(model), *asked, "--device", "cpu"]) == 0
    lines = (model / "eval" / "words-answers.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    score = 100 * sum(answer == "red" for answer in answers) / 5
    assert json.loads((model / "eval" / "words-scores.json").read_text())["scores"] == {"words": score}
    score_table.write_scores(model, "lmms-eval", {"textvqa": 57.25, "ocrbench": 321.0}, {"source": "lmms-eval"})
    capsys.readouterr()
    assert main(["vlm", "compare", str(model), "--recipe", "open-llava-next", "--out", str(tmp_path / "t.md")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1 + 2 + 2
    written = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in (tmp_path / "t.md").open()]
    head = written[0]
    ours = next(row for row in written if row[-1] == "lmms-eval")
    paper = next(row for row in written if row[0] == "OpenVision 2 L/14, 224 px")
    assert [ours[head.index(name)] for name in ("TextVQA", "OCRBench", "ChartQA")] == ["57.2", "321", ""]
    assert paper[1:] == [
        "open-llava-next", "66.1", "60.4", "501", "1577", "297", "73.1", "68.4", "64.6", "87.6", "", "arXiv 2509.01644",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval", "{model}"], "nothing to do: give --questions FILE or --tasks"),
        (["eval", "{parts}", "--tasks", "pope"], "no config.json"),
        (["eval", "{model}", "--tasks", "popes", "--lmms", "{parts}"], "did you mean pope?"),
        (["eval", "{model}", "--tasks", "pope", "--lmms", "{parts}"], "no environment with lmms-eval; bash scripts/"),
        (["eval", "{model}", "--tasks", "pope", "--lmms", sys.prefix], "no environment with lmms-eval; bash scripts/"),
        (["eval", "{model}", "--questions", "q.jsonl", "--device", "gpu"], "gpu: not a device of torch; give cpu"),
        (["eval", "{model}", "--tasks", "pope", "--ocr-tokens"], "only TextVQA has OCR tokens"),
        (["compare", "{parts}"], "no scores; `ov2 vlm eval"),
        (["compare", "--recipe", "open-llava"], "did you mean open-llava-next?"),
    ],
)
def test_mistakes_are_named(
    argv: list[str], message: str, parts: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: status 2 and one line that says what to do."""
    assert main(["vlm", *(word.format(model=model, parts=parts) for word in argv)]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


# What lmms-eval 0.7.3's `textvqa_doc_to_text` returns for "What brand is it?" and two tokens, with its option `ocr` on,
# without the sentence that it ends with (scripts/lmms_rules.py compares the two in its environment).
WITH_TOKENS = "What brand is it?\nReference OCR token: ACME, 12 oz"


def test_ocr_tokens_stand_in_the_prompt(
    parts: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: lmms-eval's prompt. Tokens are those of a question's row, or of the file that TextVQA publishes with its
    questions; a question that has none is not counted. Scores with and without them stand side by side."""
    (tmp_path / "0.jpg").write_bytes((parts / "data" / "pictures" / "0.png").read_bytes())
    row = {"image_id": "0", "question": "What brand is it?", "answers": ["acme"] * 10}
    tokens = {"ocr_tokens": ["ACME", "12 oz"]}
    rows = [{"question_id": 1, **row}, {"question_id": 2, **row, **tokens}]
    (tmp_path / "val.json").write_text(json.dumps({"data": rows}))
    found = read_questions(tmp_path / "val.json", ocr_tokens=True)
    assert [one.question for one in found.questions] == [WITH_TOKENS]
    assert [(one.key, one.cause) for one in found.skipped] == [("1", "missing OCR tokens")]
    published = {"data": [{"image_id": "0", **tokens, "ocr_info": []}]}
    (tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text(json.dumps(published))
    found = read_questions(tmp_path / "val.json", ocr_tokens=True)
    assert [one.question for one in found.questions] == [WITH_TOKENS] * 2
    words = ["vlm", "eval", str(model), "--questions", str(tmp_path / "val.json"), "--max-new-tokens", "2"]
    assert main([*words, "--device", "cpu", "--ocr-tokens"]) == main([*words, "--device", "cpu"]) == 0
    rows = {row.source for row in score_table.own_rows(model) if "textvqa" in row.scores}
    assert {"ov2", "ov2, with OCR tokens"} <= rows


def test_lmms_evals_own_option_for_ocr_tokens_is_set(tmp_path: Path) -> None:
    """Oracle: the keys that lmms-eval 0.7.3's own task has, with `ocr` on; no other task has them."""
    lmms.write_tasks(["textvqa", "gqa"], tmp_path, None, tmp_path, ocr_tokens=True)
    with_tokens, without = (yaml.safe_load((tmp_path / f"ov2_{name}.yaml").read_text()) for name in ("textvqa", "gqa"))
    prompt = "\nAnswer the question using a single word or phrase."
    expected = {"default": {"pre_prompt": "", "post_prompt": prompt, "ocr": True}}
    assert with_tokens["lmms_eval_specific_kwargs"] == expected
    assert set(without) == {"include", "task"}


def test_a_failed_lmms_eval_ends_with_its_last_lines(tmp_path: Path) -> None:
    """Oracle: a real process that prints, writes no results and fails."""
    with pytest.raises(RunFailed, match=r"status 3 and 0 files of results; .*log\.txt ends with: one \| two"):
        lmms.run(["bash", "-c", "echo one; echo two >&2; exit 3"], tmp_path / "out", offline=True)


def lmms_environment() -> Path | None:
    return Path(os.environ[lmms.VARIABLE]) if os.environ.get(lmms.VARIABLE) else None


def rows_for(task: str, picture: Path, count: int) -> list[dict[str, Any]]:
    """The task's own columns, with made content."""
    more: dict[str, dict[str, Any]] = {
        "chartqa": {"type": "human_test", "answer": "1"},
        "textvqa": {"answers": ["red"] * 10, "answer": "red", "ocr_tokens": ["red"]},
        "ocrbench": {"answer": ["red", "RED"], "dataset": "SVT", "question_type": "Regular Text Recognition"},
        "mme": {"answer": "Yes"},
        "pope": {"answer": "yes", "image_source": "x", "category": "random"},
    }
    choices = {f"choice_{letter}": word for letter, word in zip("abcd", ("red", "blue", "one", "two"), strict=True)}
    more |= {
        "seed": {"answer": "A", "data_type": "image", **choices},
        "sqa": {"hint": "", "choices": ["red", "blue"], "answer": 0},
        "gqa": {"answer": "red", "imageId": "0"},
    }
    made = []
    for index in range(count):
        image = {"bytes": picture.read_bytes(), "path": f"{index}.png"}
        row = {"id": str(index), "question_id": str(index), "question": f"Is there a cat {index}?", "image": image}
        if task == "seed":  # a list: some of its questions are about a video
            row["image"] = [image]
        if task == "mme":  # two questions about each picture
            half = index // 2
            row |= {"question_id": f"{half}.png", "category": ("existence", "code_reasoning")[half % 2]}
        made.append({**row, **more[task]})
    return made


@pytest.mark.skipif(lmms_environment() is None, reason=f"{lmms.VARIABLE} names no environment with lmms-eval")
def test_lmms_eval_runs_its_tasks_offline(parts: Path, model: Path, tmp_path: Path) -> None:
    """Oracle: lmms-eval itself, in its own environment, on files of this disk, gives a score for each task."""
    from datasets import Dataset, List
    from datasets import Image as Picture

    for task in lmms.TASKS:
        rows = rows_for(task, parts / "data" / "pictures" / "0.png", 4 if task == "mme" else 2)
        kind = List(Picture()) if task == "seed" else Picture()
        (tmp_path / task).mkdir()
        Dataset.from_list(rows).cast_column("image", kind).to_parquet(str(tmp_path / task / "test.parquet"))
    words = ["vlm", "eval", str(model), "--tasks", ",".join(lmms.TASKS), "--data", str(tmp_path), "--device", "cpu"]
    assert main([*words, "--ocr-tokens"]) == 0
    samples = next((model / "eval").rglob("*_samples_ov2_textvqa.jsonl"))
    assert "Reference OCR token: red" in samples.read_text()
    scores = json.loads((model / "eval" / "lmms-eval-ocr-tokens-scores.json").read_text())
    names = {ours for task in lmms.TASKS.values() for ours, _ in task.metrics.values()}
    assert set(scores["scores"]) == names


def test_a_data_set_that_is_missing_is_named(tmp_path: Path) -> None:
    """Oracle: the error names the folder that is looked for."""
    with pytest.raises(UserError, match=r"no gqa/\*\.parquet"):
        lmms.write_tasks(["gqa"], tmp_path, tmp_path, tmp_path)


def test_a_trial_with_few_questions_is_a_row_of_its_own(tmp_path: Path) -> None:
    """Oracle: by hand. The trial's file comes last by name, and would otherwise replace the whole benchmark's score."""
    about = {"source": "lmms-eval", "limit": None}
    score_table.write_scores(tmp_path, "lmms-eval", {"pope": 85.0}, about)
    score_table.write_scores(tmp_path, "lmms-eval-first-8", {"pope": 100.0}, {**about, "limit": 8})
    rows = {row.source: row.scores["pope"] for row in score_table.own_rows(tmp_path)}
    assert rows == {"lmms-eval": 85.0, "lmms-eval, first 8 questions": 100.0}
    for about, recipe in (({}, "llava"), ({"recipe": "llava-1.5-llama-3"}, "llava-1.5-llama-3")):
        (tmp_path / "run.json").write_text(json.dumps({"config": {"kind": "llava", "encoder": "x"}, **about}))
        assert {row.recipe for row in score_table.own_rows(tmp_path)} == {recipe}
