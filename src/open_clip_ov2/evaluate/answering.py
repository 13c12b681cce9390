"""Questions asked of a model, and its answers scored by each question's rule.

Shapes: B batch, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from open_clip_ov2.data.samples import IMAGE_ENTRY, Decoder, ImageFile
from open_clip_ov2.data.skips import UNDECODABLE_IMAGE, Skipped, SkipSample, summary
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.gathering import gathered, place
from open_clip_ov2.evaluate.text.normalise import detokenized
from open_clip_ov2.evaluate.text.question_answering import RULES
from open_clip_ov2.evaluate.text.questions import Question, QuestionFile

# (images_BCHW, or what `collate` makes, keys, prompts) -> for each the text that follows its prompt.
Answerer = Callable[[Any, Sequence[str], Sequence[str]], Sequence[str]]
PLACE = "{question}"
QUESTION_TOO_LONG = "question too long"
LEAST_ROOM = 2  # tokens: a word, and the end of the text
# OCRBench's two rules make one score.
_REPORTED_AS = {"ocrbench-math": "ocrbench"}


class Answered(NamedTuple):
    """A score in [0, 1], and what it is reported under."""

    rule: str
    group: str
    score: float


def answer_questions(
    file: QuestionFile,
    answer: Answerer,
    transform: Callable[[Any], Any],
    *,
    batch_size: int = 32,
    prompt: str = PLACE,
    room: Callable[[str], int] | None = None,
    collate: Callable[[list[Any]], Any] = torch.stack,
) -> dict[str, Any]:
    """Mean scores of the answers to a file's questions, JSON-ready, also by rule and by the file's own groups; every
    process gets all, the same on any number of them.

    `transform` maps a PIL image to `(C, H, W)`, and `collate` makes a batch of what it returns. `prompt` is the text
    before the answer, with `{question}`; `room` says how many tokens one leaves for its answer. Images that do not
    decode and questions that leave no room are skipped by key. Raises UserError if all are."""
    if PLACE not in prompt:
        raise UserError(f"the prompt {prompt!r} has no {PLACE}, where the question goes")
    found: dict[int, Answered | Skipped] = {}
    usable = _usable(file.questions, Decoder(transform, ()), prompt, room, found)
    while chosen := list(islice(usable, batch_size)):
        batch = [file.questions[index] for index, _, _ in chosen]
        images = collate([image for _, image, _ in chosen])
        texts = answer(images, [one.key for one in batch], [text for _, _, text in chosen])
        for (index, _, _), one, text in zip(chosen, batch, texts, strict=True):
            score = RULES[one.rule](detokenized(text), one.answers)
            found[index] = Answered(_REPORTED_AS.get(one.rule, one.rule), one.group, score)
    rows = gathered(found).values()
    answered = [row for row in rows if isinstance(row, Answered)]
    skipped = [*file.skipped, *(row for row in rows if isinstance(row, Skipped))]
    if not answered:
        raise UserError(f"no question could be asked ({summary(skipped)}); check the images and the questions")
    return {
        **_mean(answered),
        "by_rule": _means(answered, "rule"),
        "by_group": _means(answered, "group"),
        "skipped": [asdict(one) for one in skipped],
    }


def answers_line(found: Mapping[str, Any]) -> str:
    """A result in one line."""
    rules = ", ".join(f"{rule} {row['score']:.3f} ({row['questions']:,})" for rule, row in found["by_rule"].items())
    return f"score {found['score']:.3f} of {found['questions']:,} questions: {rules}"


def _usable(
    questions: Sequence[Question],
    decoder: Decoder,
    prompt: str,
    room: Callable[[str], int] | None,
    found: dict[int, Answered | Skipped],
) -> Iterator[tuple[int, Tensor, str]]:
    """Index, image `(C, H, W)` and prompt of this process's questions that can be asked; `found` gets the others."""
    rank, world_size = place()
    for index in range(rank, len(questions), world_size):
        one = questions[index]
        text = prompt.replace(PLACE, one.question)
        try:
            if room is not None and room(text) < LEAST_ROOM:
                raise SkipSample(QUESTION_TOO_LONG, "it leaves no room for an answer")
            yield index, decoder.pixels({IMAGE_ENTRY: ImageFile((str(one.image),))}), text
        except SkipSample as skip:
            # The key does not say which file it is.
            detail = str(one.image) if skip.cause == UNDECODABLE_IMAGE else skip.detail
            found[index] = Skipped(one.key, skip.cause, detail)


def _mean(answered: Sequence[Answered]) -> dict[str, Any]:
    return {"score": sum(row.score for row in answered) / len(answered), "questions": len(answered)}


def _means(answered: Sequence[Answered], field: str) -> dict[str, Any]:
    """By a field, sorted; what has none is left out."""
    names = sorted({getattr(row, field) for row in answered} - {""})
    return {name: _mean([row for row in answered if getattr(row, field) == name]) for name in names}
