"""`ov2 vlm eval`: questions of a file, answered here, and lmms-eval's tasks, in a process of its own."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from open_clip_ov2.argv import flag, switch_flag
from open_clip_ov2.data.decode import bounded
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.answering import PLACE, answer_questions, answers_line
from open_clip_ov2.evaluate.text.question_answering import RULES
from open_clip_ov2.evaluate.text.questions import read_questions
from open_clip_ov2.files import write_text
from open_clip_ov2.tables import comma_separated, one_of, text, whole
from open_clip_ov2.vlm.benchmarks import lmms
from open_clip_ov2.vlm.benchmarks.score_table import FOLDER, scores_of_questions, write_scores

DESCRIPTION = (
    "Ask a multimodal model questions: those of a file, answered here by transformers in batches, or lmms-eval's tasks "
    "with its own prompts and scoring. Scores go to eval/ in the model's folder; `ov2 vlm compare` reads them."
)
QUESTIONS, LMMS = "questions of a file", "lmms-eval"


@dataclass(frozen=True)
class VlmEvalOptions:
    """Flags of `ov2 vlm eval`."""

    questions: Path | None = flag(
        "FILE", Path, "TextVQA's, ChartQA's, OCRBench's or DocVQA's own, or JSON lines", group=QUESTIONS
    )
    question_images: Path | None = flag("FOLDER", Path, "its pictures (default: beside the file)", group=QUESTIONS)
    question_rule: str = flag("RULE", one_of(*RULES), f"of lines that name none (default: exact); {', '.join(RULES)}",
                              default="exact", group=QUESTIONS)  # fmt: skip
    prompt: str = flag("TEXT", text, "what is asked", default=PLACE, group=QUESTIONS)
    batch_size: int = flag("N", whole(1), "questions at once", default=16, group=QUESTIONS)
    max_new_tokens: int = flag("N", whole(1), "longest answer", default=64, group=QUESTIONS)
    dtype: str = flag("D", one_of("auto", "float32", "bfloat16", "float16"), "default: auto, the folder's",
                      default="auto", group=QUESTIONS)  # fmt: skip
    tasks: tuple[str, ...] = flag(
        "NAME,NAME", comma_separated(lmms.task_name), f"of {', '.join(lmms.TASKS)}", default=(), group=LMMS
    )
    data: Path | None = flag(
        "FOLDER", Path, "holds TASK/*.parquet; nothing is downloaded then (default: from the hub)", group=LMMS
    )
    lmms: Path | None = flag("FOLDER", Path, f"its environment (default: ${lmms.VARIABLE})", group=LMMS)
    limit: int | None = flag("N", whole(1), "only the first N questions of each task", group=LMMS)
    ocr_tokens: bool = switch_flag("let TextVQA's prompt name what an OCR system has read in the picture")


def evaluate(model: Path, options: VlmEvalOptions, device: str) -> None:
    """Raises UserError, RunFailed, OSError."""
    if options.questions is None and not options.tasks:
        raise UserError("nothing to do: give --questions FILE or --tasks NAME,NAME")
    if options.ocr_tokens and options.questions is None and "textvqa" not in options.tasks:
        raise UserError("--ocr-tokens: only TextVQA has OCR tokens, and it is not among --tasks")
    if not (model / "config.json").is_file():
        raise UserError(f"{model}: no config.json, so no model of transformers; a run has one when it is finished")
    if options.questions is not None:
        _ask(model, options, device)
    if options.tasks:
        _lmms(model, options, device)


def _ask(model: Path, options: VlmEvalOptions, device: str) -> None:
    assert options.questions is not None
    file = read_questions(
        options.questions, options.question_images, options.question_rule, ocr_tokens=options.ocr_tokens
    )
    from open_clip_ov2.vlm.benchmarks.answerer import VlmAnswerer  # imports transformers

    answerer = VlmAnswerer(model, device, options.dtype, options.max_new_tokens)
    found = answer_questions(
        file, answerer, bounded, batch_size=options.batch_size, prompt=options.prompt, collate=list
    )
    name, source = _named(options.questions.stem, "ov2", options)
    about = {"source": source, "questions": str(options.questions), "prompt": options.prompt, "found": found}
    path = write_scores(model, name, scores_of_questions(options.questions.stem, found), about)
    lines = (json.dumps({"id": key, "answer": answer}) for key, answer in answerer.answers.items())
    write_text(model / FOLDER / f"{name}-answers.jsonl", "".join(f"{line}\n" for line in lines))
    print(f"{options.questions}: {answers_line(found)}")
    for group, row in found["by_group"].items():
        print(f"  {group}: {row['score']:.3f} of {row['questions']:,}")
    if found["skipped"]:
        print(f"  not counted: {len(found['skipped']):,} questions; {path} lists them")
    print(f"written: {path}, and the answers beside it")


def _lmms(model: Path, options: VlmEvalOptions, device: str) -> None:
    names, environment, out = options.tasks, lmms.find_environment(options.lmms), model / FOLDER / "lmms-eval"
    with tempfile.TemporaryDirectory() as include:
        lmms.write_tasks(names, environment, options.data, Path(include), options.ocr_tokens)
        where = "cuda:0" if device == "cuda" else device
        words = lmms.command(environment, model, names, out, Path(include), where, options.limit)
        print(f"lmms-eval answers {', '.join(names)}; its log is {out / 'log.txt'}")
        file = lmms.run(words, out, offline=options.data is not None)
    scores = lmms.read_scores(file, names)
    trial = "" if options.limit is None else f"-first-{options.limit}"
    name, source = _named(f"lmms-eval{trial}", "lmms-eval", options)
    path = write_scores(model, name, scores, {"source": source, "results": str(file), "limit": options.limit})
    for name, score in scores.items():
        print(f"  {name}: {score:.1f}")
    print(f"written: {path}")


def _named(name: str, source: str, options: VlmEvalOptions) -> tuple[str, str]:
    """Name and source of scores; those with OCR tokens stand beside those without."""
    return (f"{name}-ocr-tokens", f"{source}, with OCR tokens") if options.ocr_tokens else (name, source)
