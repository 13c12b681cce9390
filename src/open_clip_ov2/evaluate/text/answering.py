"""Questions put to a model, and its answers scored by each question's rule.

Shapes: B batch, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.data.decode import MAX_IMAGE_PIXELS
from open_clip_ov2.data.samples import IMAGE_ENTRY, Decoder, ImageFile, seeded
from open_clip_ov2.data.skips import TRANSFORM_FAILED, UNDECODABLE_IMAGE, SkipSample
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.eval_model import gathered
from open_clip_ov2.evaluate.skipped import Skipped, summary
from open_clip_ov2.evaluate.text.detokenize import detokenized
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
    """One question, what the model said, and its score in [0, 1]."""

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
    """`answered` in file order; `skipped` is in no mean."""

    answered: tuple[Answered, ...]
    skipped: tuple[Skipped, ...]

    @property
    def overall(self) -> Mean:
        return _mean(self.answered)

    def by_rule(self) -> dict[str, Mean]:
        return self._by(lambda one: _REPORTED_AS.get(one.rule, one.rule))

    def by_group(self) -> dict[str, Mean]:
        """By what the file groups questions by (OCRBench's types); those without a group are left out."""
        return self._by(lambda one: one.group)

    def _by(self, name: Callable[[Answered], str]) -> dict[str, Mean]:
        names = sorted({name(one) for one in self.answered} - {""})
        return {wanted: _mean(one for one in self.answered if name(one) == wanted) for wanted in names}

    def as_json(self) -> dict[str, Any]:
        return {
            "overall": asdict(self.overall),
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
    clean: Callable[[str], str] = detokenized,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    room: Callable[[str], int] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> AnswerScores:
    """Scores of the answers to all questions of a file; all processes get all, the same for any number of them.

    `transform` maps a PIL image to `(C, H, W)`. `prompt` is the text before the answer, `{question}` in it the place
    of the question. `answer` is called with batches of this process's share, of `batch_size` but for the last;
    `clean` is what is done to its answers before they are scored; `room` tells how many tokens a prompt leaves to its
    answer. Images that do not decode, and questions that leave no room, are skipped by key. Raises UserError if all
    are, or the prompt lacks its place.
    """
    if PLACE not in prompt:
        raise UserError(f"the prompt {prompt!r} has no {PLACE}, where the question goes")
    decoder = Decoder(transform, (), max_image_pixels)
    answered: dict[int, Answered] = {}
    bad: dict[int, Skipped] = {}
    mine = []
    for index in range(rank, len(file.questions), world_size):
        one = file.questions[index]
        left = LEAST_ROOM if room is None else room(prompt.replace(PLACE, one.question))
        if left < LEAST_ROOM:
            bad[index] = Skipped(one.key, QUESTION_TOO_LONG, "it leaves no room for an answer")
        else:
            mine.append(index)
    for indices, images_BCHW in _batches(file.questions, mine, decoder, batch_size, bad):
        batch = [file.questions[index] for index in indices]
        prompts = [prompt.replace(PLACE, one.question) for one in batch]
        texts = map(clean, answer(images_BCHW, [one.key for one in batch], prompts))
        for index, one, text in zip(indices, batch, texts, strict=True):
            answered[index] = Answered(one.key, one.rule, one.group, text, RULES[one.rule](text, one.answers))
    rows = gathered(answered, world_size)
    skipped = (*file.skipped, *gathered(bad, world_size).values())
    if not rows:
        raise UserError(f"no question could be asked ({summary(skipped)}): look at images and questions")
    return AnswerScores(tuple(rows.values()), skipped)


def _batches(
    questions: Sequence[Question], indices: Iterable[int], decoder: Decoder, batch_size: int, bad: dict[int, Skipped]
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices and images `(B, C, H, W)` of those that decode; the others into `bad`."""
    chosen: list[int] = []
    images: list[Tensor] = []
    for index in indices:
        try:
            images.append(_image(questions[index], decoder))
        except SkipSample as skip:
            # Not PIL's message, which holds an address in memory: results are the same from run to run.
            detail = str(questions[index].image) if skip.cause == UNDECODABLE_IMAGE else skip.detail
            bad[index] = Skipped(questions[index].key, skip.cause, detail)
            continue
        chosen.append(index)
        if len(chosen) == batch_size:
            yield chosen, torch.stack(images)
            chosen, images = [], []
    if chosen:
        yield chosen, torch.stack(images)


def _image(question: Question, decoder: Decoder) -> Tensor:
    """Image `(C, H, W)`. Raises SkipSample."""
    image = decoder.image({IMAGE_ENTRY: ImageFile((str(question.image),))})
    try:
        with seeded(0):  # as in Decoder.evaluate: a transform that draws neither varies nor disturbs the model
            return decoder.transform(image)
    except Exception as error:  # whatever a user's transform raises costs one question
        raise SkipSample(TRANSFORM_FAILED, f"{type(error).__name__}: {error}") from error
