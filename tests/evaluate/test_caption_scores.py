"""CIDEr-D, BLEU-4 and ROUGE-L. Oracles: examples of the papers and of nltk's documentation, and plain versions of the
papers' formulas written here.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from math import exp, log, prod, sqrt

import pytest

from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.text.captioning import EMPTY_REFERENCES, caption_scores

GUIDE = "It is a guide to action which ensures that the military always obeys the commands of the party"
GUIDES = [
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
]
BOOK = "he read the book because he was interested in world history"
BOOKS = ["he was interested in world history because he read the book"]


def test_published_bleu() -> None:
    """Papineni's example 1 (2002, section 2.1) with BLEU-4 as in nltk's documentation: alone and in a corpus."""
    assert caption_scores({0: GUIDE}, {0: GUIDES})["bleu4"] == pytest.approx(0.5045666840058485, abs=1e-7)
    both = caption_scores({0: GUIDE, 1: BOOK}, {0: GUIDES, 1: BOOKS})
    assert both["bleu4"] == pytest.approx(0.5920778868801042, abs=1e-7)


def test_published_rouge_l() -> None:
    """Lin 2004, section 3.1: of "police killed the gunman" S2 has 3 of 4 in sequence, S3 and S4 two. P = R, so that
    beta does not matter.
    """
    cases = {"police kill the gunman": 0.75, "the gunman kill police": 0.5, "the gunman police killed": 0.5}
    for caption, score in cases.items():
        assert caption_scores({0: caption}, {0: ["police killed the gunman"]})["rouge_l"] == pytest.approx(
            score, abs=1e-12
        )


def test_rouge_l_by_hand() -> None:
    """P = 2/2 from the first reference, R = 2/3: (1 + 1.44) P R / (R + 1.44 P)."""
    scores = caption_scores({0: "a cat"}, {0: ["a black cat", "dogs bark very loudly"]})
    assert scores["rouge_l"] == pytest.approx(2.44 * (2 / 3) / (2 / 3 + 1.44), abs=1e-12)


def ngrams(caption: str, n: int) -> Counter[tuple[str, ...]]:
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def plain_cider(captions: list[str], references: list[list[str]]) -> float:
    """CIDEr-D, section 7 of the paper, with counts as term frequencies, as in COCO's evaluation."""
    total = 0.0
    for n in (1, 2, 3, 4):
        frequency = Counter(gram for group in references for gram in {g for r in group for g in ngrams(r, n)})

        def weights(text: str, n: int = n, frequency: Counter = frequency) -> dict[tuple[str, ...], float]:
            counts = ngrams(text, n)
            return {gram: count * log(len(references) / max(1, frequency[gram])) for gram, count in counts.items()}

        for caption, group in zip(captions, references, strict=True):
            for reference in group:
                ours, theirs = weights(caption), weights(reference)
                size = sqrt(sum(w * w for w in ours.values()) * sum(w * w for w in theirs.values()))
                dot = sum(min(w, theirs[gram]) * theirs[gram] for gram, w in ours.items() if gram in theirs)
                gap = len(caption.split()) - len(reference.split())
                total += 10 / len(group) * exp(-(gap**2) / (2 * 6**2)) * (dot / size if size else 0) / 4
    return total / len(captions)


def plain_bleu(captions: list[str], references: list[list[str]]) -> float:
    """Corpus BLEU-4, section 2.3 of the paper; reference length closest to the caption's, the shorter of two."""
    precisions = []
    for n in (1, 2, 3, 4):
        found = possible = 0
        for caption, group in zip(captions, references, strict=True):
            most = Counter[tuple[str, ...]]()
            for reference in group:
                most |= ngrams(reference, n)
            found += (ngrams(caption, n) & most).total()
            possible += ngrams(caption, n).total()
        precisions.append(found / possible)
    given = sum(len(caption.split()) for caption in captions)
    wanted = 0
    for caption, group in zip(captions, references, strict=True):
        lengths = [len(reference.split()) for reference in group]
        wanted += min(lengths, key=lambda length: (abs(length - len(caption.split())), length))
    return min(1.0, exp(1 - wanted / given)) * prod(precisions) ** 0.25


@pytest.fixture
def corpus() -> tuple[list[str], list[list[str]]]:
    """Twenty pictures with a caption of two to twelve words and one to five references, from few words, so that long
    n-grams match.
    """
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choices(("red", "dog", "runs", "on", "grass"), k=rng.randint(2, 12)))

    return [text() for _ in range(20)], [[text() for _ in range(rng.randint(1, 5))] for _ in range(20)]


def test_cider_and_bleu_are_the_papers(corpus: tuple[list[str], list[list[str]]]) -> None:
    captions, references = corpus
    scores = caption_scores(dict(enumerate(captions)), dict(enumerate(references)))
    assert scores["cider"] == pytest.approx(plain_cider(captions, references), abs=1e-9)
    assert scores["bleu4"] == pytest.approx(plain_bleu(captions, references), abs=1e-7)
    assert 0.1 < scores["bleu4"] < 0.9
    assert scores["cider"] > 0.1


def test_order_does_not_matter(corpus: tuple[list[str], list[list[str]]]) -> None:
    """Property, bit for bit: what processes contribute arrives in any order."""
    captions, references = (dict(enumerate(part)) for part in corpus)
    backwards = (dict(reversed(part.items())) for part in (captions, references))
    assert caption_scores(*backwards) == caption_scores(captions, references)


def test_empty_references_are_reported_and_left_out(corpus: tuple[list[str], list[list[str]]]) -> None:
    """Property: the same scores as without the pictures; blank references beside good ones do not count either."""
    captions, references = (dict(enumerate(part)) for part in corpus)
    alone = caption_scores(captions, references)
    spoilt = {**references, 0: [*references[0], " "], 77: [], 78: ["", "..."]}
    keys = {index: f"key {index}" for index in spoilt}
    scores = caption_scores({**captions, 77: "a dog", 78: "a dog"}, spoilt, keys)
    skipped = [(one["key"], one["cause"]) for one in scores["skipped"]]
    assert skipped == [(f"key {i}", EMPTY_REFERENCES) for i in (77, 78)]
    assert {**scores, "skipped": []} == alone
    with pytest.raises(UserError, match=r"no picture has a reference caption.*5: no reference with a word"):
        caption_scores({5: "a dog"}, {5: [" "]})


def test_an_empty_caption_counts_as_nothing() -> None:
    """By hand: half the pictures at ROUGE-L 1, half at 0."""
    scores = caption_scores({0: "a dog", 1: ""}, {0: ["a dog"], 1: ["a cat"]})
    assert scores["rouge_l"] == 0.5
    assert scores["pictures"] == 2
    with pytest.raises(ValueError, match=r"differ in \[1\]"):
        caption_scores({0: "x", 1: "y"}, {0: ["x"]})


def test_without_the_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: one line with the command."""
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(UserError, match=r"pip install 'open_clip_ov2\[eval\]'"):
        caption_scores({0: "x"}, {0: ["x"]})
