"""Texts in the form in which they are compared, and the edit distance between two of them.

`vqa_normalised` follows TextVQA's official evaluation, `EvalAIAnswerProcessor` of facebookresearch/mmf
(mmf/utils/m4c_evaluators.py), its oddities included: a score is comparable only if they are the same.

`detokenized` joins what tokenizers split: OpenCLIP's BPE decodes "$1,000.50" and "it's" as "$ 1 , 0 0 0 . 5 0" and
"it 's". What stood apart on purpose cannot be told from that: "1 2" becomes 12, "red - 5" becomes red-5.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: str(value) for value, word in enumerate(_DIGITS)}
NUMBERS = NUMBER_WORDS | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Words with the apostrophes they should have. The official table maps each with one apostrophe missing to these. Its
# entries that no word equals once case is lowered and 's split off (Im, Ive, let's, she's) are left out.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word for word in _CONTRACTIONS.split() for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # the wrong way round in the official table

_PERIOD = re.compile(r"\.(?!\d)")
# The official code passes re.UNICODE where `count` stands, which is 32: later periods stay.
_MOST_PERIODS = 32
_JOINED = (
    (re.compile(r"(?<=\d) (?=\d)"), ""),  # 1 2 -> 12
    (re.compile(r"(?<=\d) ?([./]) (?=\d)"), r"\1"),  # 3 . 5 -> 3.5
    (re.compile(r"(?<=\d) ?, (?=\d{3}\b)"), ","),  # 1 , 000 -> 1,000
    (re.compile(r"(?<=\d) ?: (?=\d\d\b)"), ":"),  # 12 : 30 -> 12:30
    (re.compile(r"(?<=\b[^\W\d_]) ?\. (?=[^\W\d_] ?\.)"), "."),  # u . s . -> u.s.
    (re.compile(r"(?<=\w) ' ?(?=(?:s|t|m|d|re|ve|ll)\b)"), "'"),  # it 's, don ' t -> it's, don't
    (re.compile(r"(?<=\w) - (?=\w)"), "-"),  # t - shirt -> t-shirt
    (re.compile(r"([$€£#]) (?=\d)"), r"\1"),  # $ 5 -> $5
    (re.compile(r" (?=[.,!?;:%)\]](?:\W|$))"), ""),  # a dog . -> a dog.
    (re.compile(r"([(\[]) (?=\w)"), r"\1"),  # ( a -> (a
    (re.compile(r"^- (?=\d)"), "-"),  # - 5 -> -5, as an answer
)


def vqa_normalised(answer: str) -> str:
    """Lower case, single spaces, number words as digits, apostrophes restored, without punctuation, articles and
    periods (those in decimals stay). A mark that touches a space anywhere is deleted everywhere, any other becomes a
    space."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain = text
    for mark in PUNCTUATION:
        plain = plain.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    plain = _PERIOD.sub("", plain, count=_MOST_PERIODS)
    words = (NUMBERS.get(word, word) for word in plain.split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def number(text: str) -> float | None:
    """The number that a text is, or None. `12%` is 0.12, as in ChartQA's evaluation (question_answering.relaxed)."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def plain(text: str) -> str:
    """Lower case, each run of white space one space, none at the ends."""
    return " ".join(text.lower().split())


def detokenized(text: str) -> str:
    """The text with its numbers, contractions and punctuation joined as they would be written."""
    for pattern, replacement in _JOINED:
        text = pattern.sub(replacement, text)
    return text


def edit_distance(true: Sequence[Hashable], generated: Sequence[Hashable]) -> int:
    """Fewest insertions, deletions and substitutions that turn one into the other (Levenshtein, 1966)."""
    above = list(range(len(generated) + 1))
    for row, wanted in enumerate(true, start=1):
        left = row
        current = [left]
        for column, found in enumerate(generated, start=1):
            left = min(above[column] + 1, left + 1, above[column - 1] + (wanted != found))
            current.append(left)
        above = current
    return above[-1]
