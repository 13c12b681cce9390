"""What a comparison answers: for each question one sentence with the difference, its interval, and "cannot tell".

The interval is a bootstrap over pictures and seeds. In each draw the pictures are drawn with replacement, the same ones
for both models, since both were asked about the same; then each model's seeds are. Means over n seeds vary by (n - 1)
/ n of what they should, which a factor of sqrt(n / (n - 1)) sets right (Efron and Tibshirani 1993, chapter 10).

Shapes: S seeds, M pictures, n draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from open_clip_ov2.compare.config import Comparison, Metric, Question
from open_clip_ov2.errors import UserError

DRAWS, SEED, LEVEL = 4000, 0, 0.95
BLOCK = 1 << 24  # numbers held at once


class Outcomes(NamedTuple):
    """`values` `(S, M)` of one model and metric; `keys` of the pictures, None where only the seeds' means are known."""

    keys: tuple[str, ...] | None
    values: np.ndarray


@dataclass(frozen=True)
class Answer:
    """Values as they are shown. `low`, `high`: of the difference a - b; `error`: its standard error. `better` is 1 if
    the interval says that a is better, -1 that b is, 0 if it cannot tell. `pictures`: 0 where only seeds are known."""

    question: Question
    metric: Metric
    mean_a: float
    mean_b: float
    low: float
    high: float
    error: float
    better: int
    pictures: int
    seeds: tuple[int, int]

    @property
    def difference(self) -> float:
        return self.mean_a - self.mean_b

    @property
    def _verdict(self) -> str:
        return {1: "Yes", -1: "No, the other way round", 0: "Cannot tell"}[self.better]

    @property
    def _unit(self) -> str:
        return "%" if self.metric.unit == "%" else f" {self.metric.unit}".rstrip()

    @property
    def _difference(self) -> tuple[str, str]:
        """The difference with its unit, and its interval."""
        digits = self.metric.digits
        unit = " points" if self._unit == "%" else self._unit
        return f"{self.difference:+.{digits}f}{unit}", f"{self.low:.{digits}f} to {self.high:.{digits}f}"

    @property
    def sentence(self) -> str:
        a, b = (f"{value:.{self.metric.digits}f}" for value in (self.mean_a, self.mean_b))
        difference, interval = self._difference
        return (
            f"{self.question.text} {self._verdict}: {self.question.a} {a} against {self.question.b} {b}{self._unit} on "
            f"{self.metric.label}, a difference of {difference} ({LEVEL:.0%} interval {interval}; {self._counted})."
        )

    @property
    def brief(self) -> str:
        """Below a table of the values, in Markdown."""
        return "{} **{}**: {} ({}).".format(self.question.text, self._verdict, *self._difference)

    @property
    def _counted(self) -> str:
        a, b = self.seeds
        seeds = f"{a} seed{'s' if a > 1 else ''}" if a == b else f"{a} and {b} seeds"
        only = ", which says nothing of how seeds differ" if min(a, b) < 2 else ""
        return f"{self.pictures:,} images, {seeds}{only}" if self.pictures else f"{seeds} alone{only}"


def answers(comparison: Comparison, found: Mapping[str, Mapping[str, Outcomes]]) -> tuple[Answer, ...]:
    """`found`: outcomes by variant and by a metric's key. Without questions in the file: whether the reference is
    better than each other trained variant, on the first metric that both have. Raises UserError for a question about
    a metric that one of its variants has not."""
    return tuple(_answer(comparison, one, found) for one in comparison.questions or _questions(comparison, found))


def _questions(comparison: Comparison, found: Mapping[str, Mapping[str, Outcomes]]) -> list[Question]:
    a, out = comparison.reference, []
    for b in (variant.name for variant in comparison.trained if variant.name != a):
        shared = [one for one in comparison.metrics if one.key in found.get(a, {}) and one.key in found.get(b, {})]
        if shared:
            out.append(Question(a, b, shared[0].key, f"Is {a} better than {b}?"))
    return out


def _answer(comparison: Comparison, question: Question, found: Mapping[str, Mapping[str, Outcomes]]) -> Answer:
    metric = next(one for one in comparison.metrics if one.key == question.metric)
    for name in (question.a, question.b):
        if metric.key not in found.get(name, {}):
            raise UserError(f"{comparison.name}: question {question.text!r}: {name} has no values of {metric.key}")
    a, b = (found[name][metric.key] for name in (question.a, question.b))
    if a.keys != b.keys:
        raise UserError(
            f"{comparison.name}: question {question.text!r}: {question.a} and {question.b} were evaluated on different "
            "images; evaluate both on the same data"
        )
    drawn_n = metric.scale * differences(a.values, b.values)
    low, high = np.quantile(drawn_n, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    one_number_each = a.keys is None and min(len(a.values), len(b.values)) < 2
    tells = np.isfinite(drawn_n).all() and (low > 0 or high < 0) and not one_number_each
    return Answer(
        question,
        metric,
        mean_a=float(metric.scale * a.values.mean()),
        mean_b=float(metric.scale * b.values.mean()),
        low=float(low),
        high=float(high),
        error=float(drawn_n.std(ddof=1)),
        better=metric.sign * (1 if low > 0 else -1) if tells else 0,
        pictures=len(a.keys or ()),
        seeds=(len(a.values), len(b.values)),
    )


def differences(a_SM: np.ndarray, b_SM: np.ndarray, draws: int = DRAWS) -> np.ndarray:
    """The bootstrap's differences between both means, `(n,)`. The same numbers give the same draws."""
    rng, pictures = np.random.default_rng(SEED), a_SM.shape[1]
    a_nS, b_nS = np.empty((draws, len(a_SM))), np.empty((draws, len(b_SM)))
    step = max(1, BLOCK // pictures)
    for first in range(0, draws, step):
        size = min(step, draws - first)
        share_nM = rng.multinomial(pictures, np.full(pictures, 1 / pictures), size=size) / pictures
        a_nS[first : first + size], b_nS[first : first + size] = share_nM @ a_SM.T, share_nM @ b_SM.T
    return _over_seeds(rng, a_nS) - _over_seeds(rng, b_nS)


def _over_seeds(rng: np.random.Generator, means_nS: np.ndarray) -> np.ndarray:
    seeds, center_n = means_nS.shape[1], means_nS.mean(axis=1)
    if seeds < 2:
        return center_n
    drawn_nS = np.take_along_axis(means_nS, rng.integers(seeds, size=means_nS.shape), axis=1)
    return center_n + np.sqrt(seeds / (seeds - 1)) * (drawn_nS.mean(axis=1) - center_n)


def stacked(by_seed: Sequence[tuple[np.ndarray, np.ndarray]], where: str) -> Outcomes:
    """Outcomes of one model and metric, from the keys and values of each seed. Raises UserError if keys differ."""
    keys = tuple(map(str, by_seed[0][0]))
    if any(tuple(map(str, one)) != keys for one, _ in by_seed):
        raise UserError(f"{where}: seeds were evaluated on different images; remove the evaluations and run again")
    return Outcomes(keys, np.stack([values for _, values in by_seed]))
