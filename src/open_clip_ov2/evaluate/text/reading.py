"""What of a rendered picture was read right: its letters, words, values and counts, by kind of picture.

Error rates are edits of all pictures of a kind / length of all their captions, as is usual (Morris et al. 2004, WER),
so that a long caption weighs more than a short one. Case never matters. Spaces matter for words alone: tokenizers put
them where they like.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import reduce
from typing import Any

from open_clip_ov2.data.skips import EMPTY_CAPTION, Skipped, summary
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.text.normalise import NUMBER_WORDS, detokenized, edit_distance, number, plain
from open_clip_ov2.evaluate.text.question_answering import RELAXED_TOLERANCE

COUNT = "count"  # the name of numbers that are written as words
_NUMBER_OR_WORD = re.compile(r"(?<!\w)-?\d+(?:,\d{3})*(?:\.\d+)?%?|[^\W\d_]+")


@dataclass(frozen=True)
class Reading:
    """Counts over pictures; a kind's rates are quotients of them."""

    pictures: int = 0
    exact: int = 0
    letters: int = 0
    letter_edits: int = 0
    words: int = 0
    word_edits: int = 0
    texts: int = 0  # pictures of a rendered word
    texts_exact: int = 0
    text_letters: int = 0
    text_edits: int = 0
    numbers: int = 0
    numbers_exact: int = 0
    numbers_relaxed: int = 0  # within 5%
    with_numbers: int = 0  # pictures that have numbers
    all_numbers_exact: int = 0  # of those, without a number too many or too few

    def __add__(self, other: Reading) -> Reading:
        return Reading(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def rates(self) -> dict[str, Any]:
        """JSON-ready; a rate of nothing is None. Error rates can exceed 1."""

        def share(part: int, whole: int) -> float | None:
            return part / whole if whole else None

        return {
            "pictures": self.pictures,
            "exact_match": share(self.exact, self.pictures),
            "character_error_rate": share(self.letter_edits, self.letters),
            "word_error_rate": share(self.word_edits, self.words),
            "texts": self.texts,
            "text_exact_match": share(self.texts_exact, self.texts),
            "text_character_error_rate": share(self.text_edits, self.text_letters),
            "numbers": self.numbers,
            "number_accuracy": share(self.numbers_exact, self.numbers),
            "number_relaxed_accuracy": share(self.numbers_relaxed, self.numbers),
            "all_numbers_exact": share(self.all_numbers_exact, self.with_numbers),
        }


@dataclass(frozen=True)
class ReadingScores:
    by_kind: dict[str, Reading]
    overall: Reading
    skipped: tuple[Skipped, ...]

    def as_json(self) -> dict[str, Any]:
        rows = {kind: reading.rates() for kind, reading in self.by_kind.items()}
        skipped = [{"key": one.key, "cause": one.cause} for one in self.skipped]
        return {**self.overall.rates(), "by_kind": rows, "skipped": skipped}


def reading_scores(
    generated: Mapping[int, str],
    true: Mapping[int, str],
    kinds: Mapping[int, str] | None = None,
    keys: Mapping[int, str] | None = None,
    text_after: str = "the word",
) -> ReadingScores:
    """Generated against true captions, by the picture's index. `text_after` is what rendered text follows in a caption.

    A picture whose true caption is empty is skipped under its key (`keys`, else its index).
    Raises UserError if all are; ValueError if the indices of the two differ.
    """
    if generated.keys() != true.keys():
        raise ValueError(f"generated and true captions differ in {sorted(generated.keys() ^ true.keys())[:5]}")
    skipped = tuple(
        Skipped(keys[index] if keys else str(index), EMPTY_CAPTION) for index in sorted(true) if not true[index].strip()
    )
    read = {index: read_one(generated[index], true[index], text_after) for index in sorted(true) if true[index].strip()}
    if not read:
        raise UserError(f"no picture has a caption to be read ({summary(skipped) or 'no picture at all'})")
    by_kind: dict[str, Reading] = {}
    for index, reading in read.items():
        if kinds and kinds[index]:
            by_kind[kinds[index]] = by_kind.get(kinds[index], Reading()) + reading
    return ReadingScores(dict(sorted(by_kind.items())), reduce(Reading.__add__, read.values()), skipped)


def read_one(generated: str, true: str, text_after: str) -> Reading:
    """One picture's counts."""
    letters, given = (plain(text).replace(" ", "") for text in (true, generated))
    words, given_words = plain(true).split(), plain(detokenized(generated)).split()
    return Reading(
        pictures=1,
        exact=int(letters == given),
        letters=len(letters),
        letter_edits=edit_distance(letters, given),
        words=len(words),
        word_edits=edit_distance(words, given_words),
        **_text_counts(rendered_text(generated, text_after), rendered_text(true, text_after)),
        **_number_counts(numbers(generated), numbers(true)),
    )


def _text_counts(generated: str | None, true: str | None) -> dict[str, int]:
    if not true:
        return {}
    given = generated or ""  # a caption that tells of no text has read none
    edits = edit_distance(true, given)
    return {"texts": 1, "texts_exact": int(not edits), "text_letters": len(true), "text_edits": edits}


def _number_counts(generated: Mapping[Any, float], true: Mapping[Any, float]) -> dict[str, int]:
    if not true:
        return {}
    pairs = [(generated[name], value) for name, value in true.items() if name in generated]
    return {
        "numbers": len(true),
        "numbers_exact": sum(given == value for given, value in pairs),
        "numbers_relaxed": sum(abs(given - value) <= RELAXED_TOLERANCE * abs(value) for given, value in pairs),
        "with_numbers": 1,
        "all_numbers_exact": int(generated == true),
    }


def rendered_text(caption: str, after: str) -> str | None:
    """What follows `after`, its letters joined (the demo spells: "the word c a t" is cat); None without `after`."""
    _, found, text = f"{plain(caption)} ".partition(f"{plain(after)} ")
    return text.replace(" ", "") if found else None


def numbers(caption: str) -> dict[tuple[str, int], float]:
    """Numbers by the word before them, and their place among the numbers of that word: "red 3 and blue 2" is
    {(red, 0): 3, (blue, 0): 2}.

    Number words up to ten are counts, whatever is counted: "three red circles" is count 3.
    """
    found: dict[tuple[str, int], float] = {}
    seen: Counter[str] = Counter()
    before = ""
    for token in _NUMBER_OR_WORD.findall(detokenized(caption.lower())):
        value = number(NUMBER_WORDS.get(token, token.replace(",", "")))
        if value is None or (token.isalpha() and token not in NUMBER_WORDS):  # nan and inf are words
            before = token
            continue
        name = COUNT if token in NUMBER_WORDS else before
        found[name, seen[name]] = value
        seen[name] += 1
    return found
