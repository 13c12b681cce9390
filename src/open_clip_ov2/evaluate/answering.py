"""Questions asked of a model, and its answers scored by each question's rule.

Shapes: B batch, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.data.samples import IMAGE_ENTRY, Decoder, ImageFile
from open_clip_ov2.data.skips import UNDECODABLE_IMAGE, Skipped, SkipSample, summary
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.gathering import gathered
from open_clip_ov2.evaluate.text.normalise import detokenized
from open_clip_ov2.evaluate.text.question_answering import RULES
from open_clip_ov2.evaluate.text.questions import Question, QuestionFile

# (images_BCHW, keys, prompts) -> for each the text that follows its prompt.
Answerer = Callable[[Tensor, Sequence[str], Sequence[str]], Sequence[str]]
PLACE = "{question}"
QUESTION_TOO_LONG = "question too long"
LEAST_ROOM = 2  # tokens: a word, and the end of the text
# OCRBench's two rules make one score.
_REPORTED_AS = {"ocrbench-math": "ocrbench"}


@dataclass(frozen=True)
class Answered:
    """One question, the model's answer, and its score in [0, 1]."""

    key: str
    rule: str
    group: str
    answer: str
    score: float


@dataclass(frozen=True)
class Mean:
    score: float
    questions: int


@dataclass(frozen=True)
class AnswerScores:
    """`answered` in file order; `skipped` counts in no mean."""

    answered: tuple[Answered, ...]
    skipped: tuple[Skipped, ...]

    @property
    def overall(self) -> Mean:
        return _mean(self.answered)

    def by_rule(self) -> dict[str, Mean]:
        return self._by(lambda one: _REPORTED_AS.get(one.rule, one.rule))

    def by_group(self) -> dict[str, Mean]:
        """By the file's own groups (OCRBench's types); questions without a group are left out."""
        return self._by(lambda one: one.group)

    def _by(self, name: Callable[[Answered], str]) -> dict[str, Mean]:
        names = sorted({name(one) for one in self.answered} - {""})
        return {wanted: _mean(one for one in self.answered if name(one) == wanted) for wanted in names}

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self.overall),
            "by_rule": {name: asdict(mean) for name, mean in self.by_rule().items()},
            "by_group": {name: asdict(mean) for name, mean in self.by_group().items()},
            "skipped": [asdict(one) for one in self.skipped],
        }


def _mean(answered: Iterable[Answered]) -> Mean:
    scores = [one.score for one in answered]
    return Mean(sum(scores) / len(scores), len(scores))


def answer_questions(
    file: QuestionFile,
    answer: Answerer,
    transform: Callable[[Any], Tensor],
    *,
    batch_size: int = 32,
    prompt: str = PLACE,
    room: Callable[[str], int] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> AnswerScores:
    """Scores of the answers to all questions of a file; every process gets all, the same on any number of them.

    `transform` maps a PIL image to `(C, H, W)`. `prompt` is the text before the answer, with the question in the place
    of `{question}`. `answer` is called with batches of this process's questions; `room` says how many tokens a prompt
    leaves for its answer. Images that do not decode and questions that leave no room are skipped by key. Raises
    UserError if all are, or if the prompt has no `{question}`.
    """
    if PLACE not in prompt:
        raise UserError(f"the prompt {prompt!r} has no {PLACE}, where the question goes")
    decoder = Decoder(transform, ())
    answered: dict[int, Answered] = {}
    bad: dict[int, Skipped] = {}
    usable = _usable(file.questions, range(rank, len(file.questions), world_size), decoder, prompt, room, bad)
    while chosen := list(islice(usable, batch_size)):
        batch = [file.questions[index] for index, _ in chosen]
        prompts = [prompt.replace(PLACE, one.question) for one in batch]
        images_BCHW = torch.stack([image for _, image in chosen])
        texts = map(detokenized, answer(images_BCHW, [one.key for one in batch], prompts))
        for (index, _), one, text in zip(chosen, batch, texts, strict=True):
            answered[index] = Answered(one.key, one.rule, one.group, text, RULES[one.rule](text, one.answers))
    rows = gathered(answered, world_size)
    skipped = (*file.skipped, *gathered(bad, world_size).values())
    if not rows:
        raise UserError(f"no question could be asked ({summary(skipped)}); check the images and the questions")
    return AnswerScores(tuple(rows.values()), skipped)


def _usable(
    questions: Sequence[Question],
    indices: Iterable[int],
    decoder: Decoder,
    prompt: str,
    room: Callable[[str], int] | None,
    bad: dict[int, Skipped],
) -> Iterator[tuple[int, Tensor]]:
    """Indices and images `(C, H, W)` of the questions that can be asked; the others go into `bad`."""
    for index in indices:
        one = questions[index]
        if room is not None and room(prompt.replace(PLACE, one.question)) < LEAST_ROOM:
            bad[index] = Skipped(one.key, QUESTION_TOO_LONG, "it leaves no room for an answer")
            continue
        try:
            yield index, decoder.pixels({IMAGE_ENTRY: ImageFile((str(one.image),))})
        except SkipSample as skip:
            # Not PIL's message, which holds an address in memory: results are the same from run to run.
            detail = str(one.image) if skip.cause == UNDECODABLE_IMAGE else skip.detail
            bad[index] = Skipped(one.key, skip.cause, detail)
