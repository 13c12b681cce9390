"""Rules of question answering. Oracles: cases worked by hand from the papers' formulas and from the official
evaluations' code, and plain versions of what is computed in short forms.
"""

from __future__ import annotations

import itertools
import random

import pytest

from open_clip_ov2.evaluate.text.normalise import CONTRACTIONS, edit_distance, vqa_normalised
from open_clip_ov2.evaluate.text.question_answering import anls, exact, ocrbench, ocrbench_math, relaxed, vqa


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The Dog.", "dog"),
        ("a man's hat", "man 's hat"),
        ("dont walk", "don't walk"),
        ("I havent", "i haven't"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),  # the official table has this one the wrong way round
        ("Im", "im"),  # its entries with a capital never match lower-cased words
        ("Two", "2"),
        ("None", "0"),
        ("twenty", "twenty"),
        ("1,000", "1000"),
        ("3.50", "3.50"),
        (".5 to 5.", ".5 to 5"),
        ("u.s.a.", "usa"),
        ("coca-cola", "coca cola"),
        ("this - that-way", "this thatway"),  # a hyphen at a space deletes all hyphens
        ("yes!", "yes"),
        ("what?", "what"),
        ("\tone\nline ", "1 line"),
        ("the", ""),
    ],
)
def test_vqa_normalisation(answer: str, normalised: str) -> None:
    """Oracle: steps of EvalAIAnswerProcessor, followed by hand."""
    assert vqa_normalised(answer) == normalised


def test_contractions_lack_one_apostrophe() -> None:
    """Property of the official table, but for the entry that is the wrong way round."""
    for wrong, right in CONTRACTIONS.items():
        if wrong != "somebody'd":
            assert right.count("'") == wrong.count("'") + 1
            assert right.replace("'", "") == wrong.replace("'", "")


def slow_vqa(answer: str, answers: list[str]) -> float:
    """The official definition: for each of the ten people, min(how many of the other nine agree / 3, 1); the mean."""
    scores = [min(sum(one == answer for one in others) / 3, 1) for others in itertools.combinations(answers, 9)]
    return sum(scores) / len(scores)


@pytest.mark.parametrize("agreeing", range(11))
def test_vqa_leaves_one_out(agreeing: int) -> None:
    answers = ["Coke"] * agreeing + [f"other {index}" for index in range(10 - agreeing)]
    assert vqa("coke.", answers) == pytest.approx(slow_vqa("Coke", answers), abs=1e-12)


def test_vqa_by_hand() -> None:
    """One of ten: 9 x 1/3 and once 0. Two: 8 x 2/3 and 2 x 1/3. Three: 7 x 1 and 3 x 2/3. Four: all 1."""
    for agreeing, score in {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9, 4: 1.0}.items():
        assert vqa("x", ["x"] * agreeing + ["y"] * (10 - agreeing)) == pytest.approx(score, abs=1e-12)
    with pytest.raises(ValueError, match="10 answers, not 3"):
        vqa("x", ["x"] * 3)


@pytest.mark.parametrize(
    ("answer", "true", "score"),
    [
        ("105", "100", 1),
        ("95", "100", 1),
        ("105.1", "100", 0),
        ("94.9", "100", 0),
        ("-100", "100", 0),
        ("-102", "-100", 1),
        ("12%", "0.12", 1),
        ("12", "12%", 0),
        ("12.3%", "12%", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),  # zero is compared as text
        ("0.01", "0", 0),
        ("1,000", "1000", 0),  # so are thousands
        ("Yes", "yes", 1),
        ("yes.", "yes", 0),
        ("2010", "2014", 1),  # years too are numbers to the official evaluation
        (" 5 ", "5", 1),
        ("", "5", 0),
        ("nan", "5", 0),
    ],
)
def test_relaxed(answer: str, true: str, score: float) -> None:
    """Oracle: |answer - true| <= 0.05 |true|, by hand."""
    assert relaxed(answer, [true]) == score


def test_relaxed_takes_the_best() -> None:
    assert relaxed("7", ["red", "7.2"]) == 1


@pytest.mark.parametrize(
    ("answer", "answers", "plain", "math"),
    [
        ("The word is CENTRE.", ["centre"], 1, 0),
        ("c e n t r e", ["centre"], 0, 1),
        ("cent", ["centre"], 0, 0),
        ("two\nlines", ["two lines"], 1, 1),
        (r"\frac { a } { B }", [r"\frac{a}{B}"], 0, 1),
        (r"\frac{a}{b}", [r"\frac{a}{B}"], 1, 0),
        ("b", ["a", " B "], 1, 0),
    ],
)
def test_ocrbench(answer: str, answers: list[str], plain: float, math: float) -> None:
    """Oracle: by hand. Containment without case; for formulas with case and without spaces."""
    assert ocrbench(answer, answers) == plain
    assert ocrbench_math(answer, answers) == math


@pytest.mark.parametrize(
    ("answer", "answers", "score"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("Sitting ", ["sitting"], 1.0),
        ("abcd", ["abxy"], 0.5),  # at the threshold: counts
        ("abc", ["xyc"], 0.0),
        ("paris", ["rome", "pariss"], 1 - 1 / 6),
        ("", ["x"], 0.0),
        ("a  b", ["a c"], 1 - 1 / 4),  # distance without the second space, length with it
    ],
)
def test_anls(answer: str, answers: list[str], score: float) -> None:
    """Oracle: equation 1 of the paper, by hand."""
    assert anls(answer, answers) == pytest.approx(score, abs=1e-12)


def test_exact() -> None:
    assert exact(" The  cat", ["dog", "the cat"]) == 1
    assert exact("the cat.", ["the cat"]) == 0


def slow_distance(one: str, two: str) -> int:
    """Levenshtein's recursion."""
    if not one or not two:
        return len(one) + len(two)
    return min(
        slow_distance(one[1:], two) + 1,
        slow_distance(one, two[1:]) + 1,
        slow_distance(one[1:], two[1:]) + (one[0] != two[0]),
    )


def test_edit_distance() -> None:
    """Oracle: the recursion, on short strings of few letters."""
    rng = random.Random(0)
    for _ in range(200):
        one, two = ("".join(rng.choices("abc", k=rng.randrange(6))) for _ in range(2))
        assert edit_distance(one, two) == slow_distance(one, two)
    assert edit_distance(["the", "cat", "sat"], ["cat", "sat", "on"]) == 2
