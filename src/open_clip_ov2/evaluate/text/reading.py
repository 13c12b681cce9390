"""What of a rendered picture was read right: its letters, words, values and counts, by kind of picture.

Error rates are edits of all pictures of a kind / length of all their captions, as is usual (Morris et al. 2004, WER),
so that a long caption weighs more than a short one. Case never matters. Spaces matter for words alone: tokenizers put
them where they like.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from open_clip_ov2.data.skips import EMPTY_CAPTION, Skipped, summary
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.text.normalise import NUMBER_WORDS, detokenized, edit_distance, number, plain
from open_clip_ov2.evaluate.text.outcomes import OUTCOMES, outcome
from open_clip_ov2.evaluate.text.question_answering import RELAXED_TOLERANCE

COUNT = "count"  # the name of numbers that are written as words
TEXT_AFTER = re.compile(r"\bthe words? (.*)")  # what rendered text follows in a caption, in `plain` text
# Rates, and the counts whose quotients they are.
RATES = {
    "exact_match": ("exact", "pictures"),
    "character_error_rate": ("letter_edits", "letters"),
    "word_error_rate": ("word_edits", "words"),
    "text_exact_match": ("texts_exact", "texts"),  # of pictures of rendered words
    "text_character_error_rate": ("text_edits", "text_letters"),
    "number_accuracy": ("numbers_exact", "numbers"),
    "number_relaxed_accuracy": ("numbers_relaxed", "numbers"),  # within 5%
    "all_numbers_exact": ("all_numbers_exact", "with_numbers"),  # of pictures with numbers: none too many or too few
}
PICTURE_ERROR = "picture_error"  # the mean over pictures of a picture's character error rate, 1 at most
RIGHT_OR_WRONG = ("exact_match", "text_exact_match", "all_numbers_exact")  # rates of which a picture has 0 or 1
_NUMBER_OR_WORD = re.compile(r"(?<!\w)-?\d+(?:,\d{3})*(?:\.\d+)?%?|[^\W\d_]+")


def reading_scores(rows: Iterable[tuple[str, str, str, str]]) -> dict[str, Any]:
    """Rates of all pictures and `by_kind`, JSON-ready; each row is a picture's key, kind, true and generated caption.
    A picture whose true caption is empty is skipped under its key. Raises UserError if all are."""
    overall: Counter[str] = Counter()
    by_kind: dict[str, Counter[str]] = {}
    each: dict[str, list[tuple[str, float]]] = {}  # by metric: a picture's key, and whether it is right or how wrong
    skipped: list[Skipped] = []
    for key, kind, true, generated in rows:
        if not true.strip():
            skipped.append(Skipped(key, EMPTY_CAPTION))
            continue
        counts = read_one(generated, true)
        overall.update(counts)
        if kind:
            by_kind.setdefault(kind, Counter()).update(counts)
        values = {name: float(counts[RATES[name][0]]) for name in RIGHT_OR_WRONG if counts[RATES[name][1]]}
        values[PICTURE_ERROR] = min(1.0, counts["letter_edits"] / max(1, counts["letters"]))
        for name, value in values.items():
            for path in (name, *([f"by_kind.{kind}.{name}"] if kind else [])):
                each.setdefault(path, []).append((key, value))
    if not overall:
        raise UserError(f"no image has a caption to be read ({summary(skipped) or 'no image at all'})")

    def with_error(counts: Mapping[str, int], prefix: str = "") -> dict[str, Any]:
        return rates(counts) | {PICTURE_ERROR: statistics.fmean(value for _, value in each[prefix + PICTURE_ERROR])}

    return {
        **with_error(overall),
        "by_kind": {kind: with_error(counts, f"by_kind.{kind}.") for kind, counts in sorted(by_kind.items())},
        "skipped": [asdict(one) for one in skipped],
        OUTCOMES: {path: outcome(*zip(*rows, strict=True)) for path, rows in each.items()},
    }


def rates(counts: Mapping[str, int]) -> dict[str, Any]:
    """JSON-ready; a rate of nothing is None. Error rates can exceed 1."""
    totals = {name: counts[name] for name in ("pictures", "texts", "numbers")}
    return totals | {
        name: counts[part] / counts[whole] if counts[whole] else None for name, (part, whole) in RATES.items()
    }


def read_one(generated: str, true: str) -> Counter[str]:
    letters, given = (plain(text).replace(" ", "") for text in (true, generated))
    words, given_words = plain(true).split(), plain(detokenized(generated)).split()
    counts = Counter(
        pictures=1,
        exact=int(letters == given),
        letters=len(letters),
        letter_edits=edit_distance(letters, given),
        words=len(words),
        word_edits=edit_distance(words, given_words),
    )
    if text := rendered_text(true):
        edits = edit_distance(text, rendered_text(generated) or "")  # a caption that tells of no text has read none
        counts.update(texts=1, texts_exact=int(not edits), text_letters=len(text), text_edits=edits)
    if wanted := numbers(true):
        found = numbers(generated)
        pairs = [(found[name], value) for name, value in wanted.items() if name in found]
        counts.update(
            numbers=len(wanted),
            numbers_exact=sum(given == value for given, value in pairs),
            numbers_relaxed=sum(abs(given - value) <= RELAXED_TOLERANCE * abs(value) for given, value in pairs),
            with_numbers=1,
            all_numbers_exact=int(found == wanted),
        )
    return counts


def rendered_text(caption: str) -> str | None:
    """What follows "the word" or "the words" without its spaces, since some tokenizers spell ("the word c a t" is cat,
    "the words cat dog" is catdog); None without that."""
    found = TEXT_AFTER.search(f"{plain(caption)} ")
    return found[1].replace(" ", "") if found else None


def numbers(caption: str) -> dict[tuple[str, int], float]:
    """Numbers by the word before them, and their place among the numbers of that word: "red 3 and blue 2" is
    {(red, 0): 3, (blue, 0): 2}. Number words up to ten are counts, whatever is counted: "three red circles" is count 3.
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
