"""Scores of one answer, each in [0, 1], by the rule of its benchmark.

vqa           TextVQA (Singh et al. 2019, arXiv 1904.08920, section 5), after VQA (Antol et al. 2015, section 2)
relaxed       ChartQA (Masry et al. 2022, arXiv 2203.10244, section 5.1)
ocrbench      OCRBench (Liu et al. 2023, arXiv 2305.07895); `ocrbench-math` for its handwritten formulas
anls          DocVQA, ST-VQA (Biten et al. 2019, arXiv 1907.00490, equation 1)
exact         equal to one of the answers but for case and white space
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from open_clip_ov2.evaluate.text.normalise import edit_distance, number, plain, vqa_normalised

VQA_ANSWERS = 10  # people asked per question; the official evaluation asserts it
VQA_AGREEING = 3  # an answer that three of the others gave counts in full
RELAXED_TOLERANCE = 0.05
ANLS_THRESHOLD = 0.5

Score = Callable[[str, Sequence[str]], float]


def vqa(answer: str, answers: Sequence[str]) -> float:
    """min(agreeing / 3, 1), averaged over the ten ways to leave one of the people out. Raises ValueError unless there
    are ten."""
    if len(answers) != VQA_ANSWERS:
        raise ValueError(f"vqa is defined on {VQA_ANSWERS} answers, not {len(answers)}")
    given = vqa_normalised(answer)
    agrees = [vqa_normalised(one) == given for one in answers]
    return sum(min((sum(agrees) - left_out) / VQA_AGREEING, 1.0) for left_out in agrees) / VQA_ANSWERS


def relaxed(answer: str, answers: Sequence[str]) -> float:
    """Numbers within 5% of one of the true ones, all else equal but for case; `12%` and `0.12` are the same number. As
    in google-research/pix2struct (pix2struct/metrics.py), whose code published results use: a true value of zero is
    compared as text, and so are thousands separators. White space at the ends is dropped here."""
    return float(any(_relaxed_one(answer.strip(), true.strip()) for true in answers))


def _relaxed_one(answer: str, true: str) -> bool:
    given, wanted = number(answer), number(true)
    if given is None or not wanted:
        return answer.lower() == true.lower()
    return abs(given - wanted) / abs(wanted) <= RELAXED_TOLERANCE


def ocrbench(answer: str, answers: Sequence[str]) -> float:
    """Whether one of the answers occurs in the given text, case aside (Yuliang-Liu/MultimodalOCR, example.py)."""
    given = _one_line(answer.lower())
    return float(any(_one_line(true.lower()) in given for true in answers))


def ocrbench_math(answer: str, answers: Sequence[str]) -> float:
    """The same for handwritten formulas (dataset HME100k): LaTeX, in which case matters and spaces do not."""
    given = _one_line(answer).replace(" ", "")
    return float(any(_one_line(true).replace(" ", "") in given for true in answers))


def _one_line(text: str) -> str:
    return text.strip().replace("\n", " ")


def anls(answer: str, answers: Sequence[str]) -> float:
    """1 - edit distance / length of the longer, case and runs of white space aside, of the closest answer; 0 where that
    is below 0.5. Lengths are those before white space is collapsed, as in the evaluation of DocVQA's challenge
    (rrc.cvc.uab.es, infographicsvqa_eval.py)."""
    distances = [edit_distance(plain(true), plain(answer)) / max(len(answer), len(true), 1) for true in answers]
    similarity = 1 - min(distances)
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def exact(answer: str, answers: Sequence[str]) -> float:
    return float(plain(answer) in {plain(true) for true in answers})


RULES: dict[str, Score] = {
    "vqa": vqa,
    "relaxed": relaxed,
    "ocrbench": ocrbench,
    "ocrbench-math": ocrbench_math,
    "anls": anls,
    "exact": exact,
}
