"""Generated text as it would be written: what tokenizers lose is put back as it most likely was.

OpenCLIP's BPE splits each digit and each mark off, so that "$1,000.50" and "it's" are decoded as "$ 1 , 0 0 0 . 5 0"
and "it 's"; word pieces come back as "$ 1, 000. 50". No number of several digits would ever be right. Text that lost
nothing stays as it is, but for digits and marks that stood apart on purpose, which cannot be told from the others:
"1 2" becomes 12, "red - 5" red-5.
"""

from __future__ import annotations

import re

_RULES = (
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


def detokenized(text: str) -> str:
    """The text with its numbers, contractions and punctuation joined again."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text
